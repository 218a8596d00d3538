"""The codes of an image under a VQ model."""

from typing import Any

import torch
import torch.nn.functional as F

from t2i_rl.core.finite import check_finite


def nearest_codes(vqmodel: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Code ids `(B, N)` of pixels `(B, 3, H, W)` in [-1, 1], by cosine as Janus's own encoder does.

    The codebook holds unit vectors.

    Raises:
        UserError: what the encoder says is not finite.
    """
    z = F.normalize(vqmodel.quant_conv(vqmodel.encoder(pixels)).float(), dim=1)
    check_finite(
        z,
        "the encodings of these images",
        "the encoder overflows in float16 (take model.dtype=bfloat16 or float32), or its weights are broken",
    )
    codebook = F.normalize(vqmodel.quantize.embedding.weight.float(), dim=1)
    return torch.einsum("bdhw,vd->bhwv", z, codebook).argmax(-1).flatten(1)
