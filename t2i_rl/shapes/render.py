"""From a scene to its image.

Objects are anti-aliased by supersampling. Since centres lie on a half-pixel grid, each stamp is
computed once and kept.
"""

from functools import cache

import numpy as np
import torch

from t2i_rl.shapes.scene import COLORS, Object, Scene

SUPERSAMPLING = 8


@cache
def stamp(shape: str, r: float, fx: float, fy: float, texture: str = "solid") -> np.ndarray:
    """Coverage in [0, 1] of one object, float32 `(S, S)` with `S = 2 * reach(r) + 1`.

    The centre lies at `(reach + fx, reach + fy)` pixels from the stamp's corner; `fx` and `fy` are
    at least 0 and below 1.
    """
    side = 2 * reach(r) + 1
    ticks = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - reach(r)
    u, v = np.meshgrid((ticks - fx) / r, (ticks - fy) / r)
    coverage = _inside(shape, u, v) * _texture(shape, texture, u, v, r)
    return coverage.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean(axis=(1, 3)).astype(np.float32)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 `(B, H, W, 3)` -> float32 `(B, 3, H, W)` in [-1, 1], as autoencoders here read it."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reach(r: float) -> int:
    """Pixels from an object's centre pixel to the edge of its stamp."""
    return int(np.ceil(r)) + 1


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 RGB `(size, size, 3)`."""
    canvas = np.full((scene.size, scene.size, 3), float(scene.background), dtype=np.float32)
    for item in scene.objects:
        _paint(canvas, item)
    return np.rint(canvas).astype(np.uint8)


def _paint(canvas: np.ndarray, item: Object) -> None:
    column, row = int(np.floor(item.x)), int(np.floor(item.y))
    alpha = stamp(item.shape, item.r, item.x - column, item.y - row, item.texture)
    size = canvas.shape[0]
    top, left = row - reach(item.r), column - reach(item.r)
    rows = slice(max(top, 0), min(top + len(alpha), size))
    columns = slice(max(left, 0), min(left + len(alpha), size))
    alpha = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    canvas[rows, columns] += alpha * (np.array(COLORS[item.color], dtype=np.float32) - canvas[rows, columns])


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Implicit shapes on [-1, 1]^2, v pointing down."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.9
    if shape == "triangle":
        return (v <= 0.9) & (v >= -0.95 + 1.85 * np.abs(u))
    if shape == "cross":
        return (np.minimum(np.abs(u), np.abs(v)) <= 0.33) & (np.maximum(np.abs(u), np.abs(v)) <= 1)
    if shape == "ring":
        return (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.3)
    if shape == "star":
        angle = np.mod(np.arctan2(u, -v), 2 * np.pi / 5) - np.pi / 5
        inner, radius = 0.42, np.hypot(u, v)
        px, py = radius * np.cos(angle), radius * np.abs(np.sin(angle))
        tip = np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        return (px - inner) * tip[1] - py * (tip[0] - inner) <= 0
    if shape == "heart":
        x, y = 1.15 * u, -1.15 * v + 0.12
        return (x**2 + y**2 - 0.65) ** 3 - 1.3 * x**2 * y**3 <= 0
    raise ValueError(f"unknown shape {shape!r}")


def _texture(shape: str, texture: str, u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    """Coverage inside the outline: rim of a hollow and bands of a striped one are 2 px."""
    if texture == "solid":
        return np.ones_like(u)
    if texture == "hollow":
        hole = 1 - 2.0 / r
        return np.where(_inside(shape, u / hole, v / hole), 0.0, 1.0)
    if texture == "striped":
        return np.where(np.mod((u + 1) * r, 4.0) < 2.0, 1.0, 0.35)
    raise ValueError(f"unknown texture {texture!r}")
