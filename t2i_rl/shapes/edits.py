"""Edits of scenes with a known answer: recolour, add, remove; what the edited picture must show, and which pixels must not change."""

from dataclasses import dataclass, replace

import numpy as np

from t2i_rl.shapes.scene import BASE_SHAPES, COLORS, Object, Scene, Wish, sample_scene
from t2i_rl.shapes.text import article, clause

KINDS = ("recolour", "add", "remove")


@dataclass(frozen=True)
class Edit:
    """`scene` is what `source` says; `meta` (GenEval form) is what `target` asks; `kept` `(S, S)` is true where nothing may change."""

    kind: str
    scene: Scene
    source: str
    target: str
    meta: dict
    kept: np.ndarray


def sample_edit(kind: str, rng: np.random.Generator, size: int = 32) -> Edit:
    """One edit of a scene of two objects (one, where another is added), all of different kinds and colours."""
    shapes = rng.permutation(BASE_SHAPES)[:2].tolist()
    colors = rng.permutation(tuple(COLORS))[:3].tolist()
    scene = sample_scene([Wish(shape, color) for shape, color in zip(shapes, colors)], rng, size)
    first, second = scene.objects
    if kind == "recolour":
        after, changed = (first, replace(second, color=colors[2])), [second]
    elif kind == "remove":
        after, changed = (first,), [second]
    elif kind == "add":
        scene, after, changed = replace(scene, objects=(first,)), (first, second), []
    else:
        raise ValueError(f"an edit is one of {', '.join(KINDS)}, not {kind!r}")
    kept = np.ones((size, size), bool)
    for item in changed:
        kept &= ~_around(item, size)
    if kind == "add":  # the new object may stand anywhere else
        kept = _around(first, size)
    meta = {"include": [clause(item.shape, color=item.color) for item in after]}
    return Edit(kind, scene, _words(scene.objects), _words(after), meta, kept)


def _words(objects: tuple[Object, ...]) -> str:
    return " and ".join(article(f"{item.color} {item.shape}") for item in objects)


def _around(item: Object, size: int, margin: int = 1) -> np.ndarray:
    """The object's box and a rim."""
    x1, y1, x2, y2 = item.box
    inside = np.zeros((size, size), bool)
    inside[
        max(0, int(y1) - margin) : int(np.ceil(y2)) + margin, max(0, int(x1) - margin) : int(np.ceil(x2)) + margin
    ] = True
    return inside


def psnr(before: np.ndarray, after: np.ndarray, kept: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over the kept pixels of two uint8 images; 99 where they are equal."""
    error = ((before.astype(float) - after) ** 2)[kept].mean()
    return float(min(99.0, 10 * np.log10(255**2 / error))) if error else 99.0
