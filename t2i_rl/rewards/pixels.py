"""Images as rewards read them with gradients: float32 `(B, 3, H, W)` in [0, 1]."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from t2i_rl.core.pixels import to_bytes as to_bytes


def to_unit(images: np.ndarray) -> torch.Tensor:
    """uint8 `(B, H, W, 3)` -> float32 `(B, 3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def prepared(pixels: torch.Tensor, processor: Any) -> torch.Tensor:
    """What CLIP's image processor makes of images, with gradients.

    The short side is resized (bicubic, antialiased), the middle is cropped and normalised. It is
    equal to the processor but for that one's rounding to whole bytes.
    """
    side, crop = processor.size["shortest_edge"], processor.crop_size
    height, width = pixels.shape[-2:]
    short = min(height, width)
    size = (side * height // short, side * width // short)
    sized = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (sized.shape[-2] - crop["height"]) // 2, (sized.shape[-1] - crop["width"]) // 2
    middle = sized[..., top : top + crop["height"], left : left + crop["width"]]
    mean = torch.tensor(processor.image_mean).view(-1, 1, 1).to(middle)
    std = torch.tensor(processor.image_std).view(-1, 1, 1).to(middle)
    return (middle - mean) / std
