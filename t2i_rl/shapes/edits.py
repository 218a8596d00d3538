"""Edits of scenes with a known answer: recolour, add, remove, and which pixels must not change."""

from dataclasses import dataclass, replace

import numpy as np

from t2i_rl.shapes.scene import BASE_SHAPES, COLORS, Object, Scene, Wish, sample_scene
from t2i_rl.shapes.text import article, clause

KINDS = ("recolour", "add", "remove")


@dataclass(frozen=True)
class Edit:
    """A scene and what an edit of it must show.

    source, target: texts of the scene and of what is asked. meta: the target in GenEval's form.
    kept: bool `(S, S)`, true where no pixel may change.
    """

    kind: str
    scene: Scene
    source: str
    target: str
    meta: dict
    kept: np.ndarray


def sample_edit(kind: str, rng: np.random.Generator, size: int = 32) -> Edit:
    """One edit of a scene of two objects, or of one where another is added.

    All objects differ in shape and colour.
    """
    shapes = rng.permutation(BASE_SHAPES)[:2].tolist()
    colors = rng.permutation(tuple(COLORS))[:3].tolist()
    scene = sample_scene([Wish(shape, color) for shape, color in zip(shapes, colors)], rng, size)
    first, second = scene.objects
    if kind == "recolour":
        edited, unchanged = (first, replace(second, color=colors[2])), ~_around(second, size)
    elif kind == "remove":
        edited, unchanged = (first,), ~_around(second, size)
    elif kind == "add":  # the new object may stand anywhere else
        scene = replace(scene, objects=(first,))
        edited, unchanged = (first, second), _around(first, size)
    else:
        raise ValueError(f"an edit is one of {', '.join(KINDS)}, not {kind!r}")
    meta = {"include": [clause(item.shape, color=item.color) for item in edited]}
    return Edit(kind, scene, _words(scene.objects), _words(edited), meta, unchanged)


def _words(objects: tuple[Object, ...]) -> str:
    return " and ".join(article(f"{item.color} {item.shape}") for item in objects)


def _around(item: Object, size: int, margin: int = 1) -> np.ndarray:
    """The object's box and a rim."""
    left, top, right, bottom = item.box
    rows = slice(max(0, int(top) - margin), int(np.ceil(bottom)) + margin)
    columns = slice(max(0, int(left) - margin), int(np.ceil(right)) + margin)
    inside = np.zeros((size, size), bool)
    inside[rows, columns] = True
    return inside


def psnr(before: np.ndarray, after: np.ndarray, compared: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images where a mask `(S, S)` is true.

    It is 99 where they are equal.
    """
    error = ((before.astype(float) - after) ** 2)[compared].mean()
    return float(min(99.0, 10 * np.log10(255**2 / error))) if error else 99.0
