"""The codes of a picture under a VQ model."""

import torch
import torch.nn.functional as F

from t2i_rl.core.finite import check_finite


def nearest_codes(vqmodel, pixels: torch.Tensor) -> torch.Tensor:
    """Code ids `(B, N)` by cosine, as the original Janus encoder does; the codebook holds unit vectors.

    Raises:
        UserError: what the encoder says is not finite.
    """
    z = F.normalize(vqmodel.quant_conv(vqmodel.encoder(pixels)).float(), dim=1)
    check_finite(
        z,
        "the encodings of these images",
        "the encoder overflows in float16 (take model.dtype=bfloat16 or float32), or its weights are broken",
    )
    return (
        torch.einsum("bdhw,vd->bhwv", z, F.normalize(vqmodel.quantize.embedding.weight.float(), dim=1))
        .argmax(-1)
        .flatten(1)
    )
