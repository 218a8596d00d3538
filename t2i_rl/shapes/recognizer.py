"""A small differentiable recogniser of `shapes`: where objects are, of which shape and colour.

Unlike the oracle it can be fooled.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from t2i_rl.core.finite import check_weights
from t2i_rl.shapes.scene import COLORS, LARGE_SHAPES, Scene

GRID = 8
COLOR_NAMES = tuple(COLORS)


class Recognizer(nn.Module):
    """Pixels `(B, 3, H, W)` in [0, 1] -> logits for each of the 64 cells of an 8x8 grid.

    They are of an object's centre `(B, 64)`, of its shape `(B, 64, 7)` and colour `(B, 64, 8)`.
    """

    def __init__(self, width: int = 64, size: int = 32):
        super().__init__()
        self.size = size
        widths = (width // 2, width, 2 * width)
        layers, channels = [], 3
        for number, width in enumerate(widths):
            stride = 1 if number == 0 else 2
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        layers += [nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels), nn.SiLU()]
        layers += [nn.Conv2d(channels, 1 + len(LARGE_SHAPES) + len(COLORS), 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        cells = self.layers(pixels * 2 - 1).flatten(2).mT
        return cells[..., 0], cells[..., 1 : 1 + len(LARGE_SHAPES)], cells[..., 1 + len(LARGE_SHAPES) :]

    @classmethod
    def load(cls, folder: str | Path) -> "Recognizer":
        """The recogniser that a folder holds, frozen.

        Raises:
            UserError: its weights are not finite.
        """
        recognizer = cls(**json.loads((Path(folder) / "config.json").read_text()))
        recognizer.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        check_weights(recognizer.named_parameters(), str(folder))
        return recognizer.float().eval().requires_grad_(False)


def cells_of(scene: Scene) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the recogniser ought to say: object or not, shape and colour, `(64,)` each.

    Shape and colour are -100 where there is no object.
    """
    present, shape, color = torch.zeros(GRID * GRID), *torch.full((2, GRID * GRID), -100)
    for item in scene.objects:
        cell = int(item.y * GRID / scene.size) * GRID + int(item.x * GRID / scene.size)
        present[cell], shape[cell], color[cell] = 1.0, LARGE_SHAPES.index(item.shape), COLOR_NAMES.index(item.color)
    return present, shape, color
