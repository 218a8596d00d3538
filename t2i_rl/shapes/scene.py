"""Scenes are data: a list of objects on a canvas.

Captions, plans, images and verdicts are functions of a scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t2i_rl.core.errors import UserError

BASE_SHAPES = ("circle", "square", "triangle", "cross")
LARGE_SHAPES = (*BASE_SHAPES, "star", "ring", "heart")
COLORS = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 225),
    "yellow": (245, 215, 30),
    "purple": (150, 35, 175),
    "orange": (250, 125, 15),
    "cyan": (40, 200, 220),
    "black": (20, 20, 20),
}
TEXTURES = ("solid", "hollow", "striped")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = (232, 236, 240, 244, 248)
CANVASES = (32, 48, 64)
MAX_OBJECTS = 4
GAP = 2.0

_RADII = {32: (4.5, 5.0, 5.5), 48: (6.5, 7.0, 7.5), 64: (8.0, 9.0, 10.0)}
_SIZED_RADII = {48: {"small": (5.0,), "large": (9.0, 9.5)}, 64: {"small": (6.0, 6.5), "large": (12.0, 13.0)}}


@dataclass(frozen=True)
class Object:
    """One object: centre `(x, y)` and half-extent `r` in pixels, all on a half-pixel grid.

    y points down.
    """

    shape: str
    color: str
    x: float
    y: float
    r: float
    texture: str = "solid"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """`(x1, y1, x2, y2)` in pixels."""
        return self.x - self.r, self.y - self.r, self.x + self.r, self.y + self.r


@dataclass(frozen=True)
class Scene:
    """Objects on a light grey background, 2 pixels apart or more, inside the canvas."""

    objects: tuple[Object, ...]
    size: int = 32
    background: int = 240


def radii(size: int, size_word: str | None = None) -> tuple[float, ...]:
    """Half-extents in pixels that an object may have on a canvas.

    Args:
        size_word: `small`, `large`, or None for the usual size.

    Raises:
        UserError: the canvas is not one of `CANVASES`, or sizes are asked for on a canvas too small
            to show them.
    """
    if size not in CANVASES:
        raise UserError(f"a shapes canvas is one of {CANVASES} pixels, not {size}")
    if size_word is None:
        return _RADII[size]
    if size not in _SIZED_RADII:
        raise UserError(f"small and large need a canvas of 48 pixels or more, not {size}")
    return _SIZED_RADII[size][size_word]


def apart(a: Object, b: Object) -> bool:
    """Whether the boxes of two objects are at least `GAP` pixels apart."""
    reach = a.r + b.r + GAP
    return abs(a.x - b.x) >= reach or abs(a.y - b.y) >= reach


def relation_holds(relation: str, subject: Object, reference: Object, threshold: float = 0.5) -> bool:
    """GenEval's rule on boxes, see `geneval_rule.relations`, with a threshold of one's own."""
    offset = np.array([subject.x - reference.x, subject.y - reference.y])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.2 * (subject.r + reference.r), 0.0)
    dx, dy = shrunk / max(float(np.linalg.norm(offset)), 1e-9)
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along > threshold


@dataclass(frozen=True)
class Wish:
    """What one object of a scene to be drawn must be; None leaves the attribute free.

    `relation` is to an earlier wish.
    """

    shape: str
    color: str | None = None
    texture: str | None = None
    size: str | None = None
    relation: tuple[str, int] | None = None


def sample_scene(wishes: Sequence[Wish], rng: np.random.Generator, size: int = 32) -> Scene:
    """Draw a scene that holds exactly the wished objects; what is free is drawn at random.

    A stated relation holds with a margin (the dominant axis, 0.6 instead of GenEval's 0.5).
    Textures are solid unless wished.
    """
    while True:
        objects: list[Object] = []
        for wish in wishes:
            candidate = place(wish, objects, rng, size)
            if candidate is None:
                break
            objects.append(candidate)
        if len(objects) == len(wishes):
            return Scene(tuple(objects), size, int(rng.choice(BACKGROUNDS)))


def place(wish: Wish, placed: Sequence[Object], rng: np.random.Generator, size: int) -> Object | None:
    """An object that is as wished and touches none of those placed; None after 24 tries.

    The wish's relation is to one of those placed, by its number.
    """
    colors = tuple(COLORS)
    r = float(rng.choice(radii(size, wish.size)))
    color = wish.color or colors[rng.integers(len(colors))]
    low, high = int(np.ceil(2 * (r + 1))), int(np.floor(2 * (size - r - 1)))
    for _ in range(24):
        x, y = (rng.integers(low, high + 1, size=2) / 2).tolist()
        candidate = Object(wish.shape, color, x, y, r, wish.texture or "solid")
        if not all(apart(candidate, other) for other in placed):
            continue
        if wish.relation is None or _clearly(wish.relation[0], candidate, placed[wish.relation[1]]):
            return candidate
    return None


def _clearly(relation: str, subject: Object, reference: Object) -> bool:
    dx, dy = abs(subject.x - reference.x), abs(subject.y - reference.y)
    dominant = dx > dy if relation in ("left of", "right of") else dy > dx
    return dominant and relation_holds(relation, subject, reference, threshold=0.6)
