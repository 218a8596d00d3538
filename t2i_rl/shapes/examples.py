"""An endless, seeded stream of (prompt, scene) examples from the training side of the world."""

from dataclasses import replace
from functools import cache

import numpy as np

from t2i_rl.core.prompts import Prompt
from t2i_rl.shapes.scene import BASE_SHAPES, COLORS, Scene, sample_scene
from t2i_rl.shapes.suites import pair_split, train_prompts, wishes

TASK_WEIGHTS = {
    "single_object": 0.06,
    "two_object": 0.12,
    "counting": 0.22,
    "colors": 0.10,
    "position": 0.22,
    "color_attr": 0.16,
    "complex": 0.06,
    "negation": 0.03,
    "knowledge": 0.03,
}


@cache
def _pool(tag: str) -> tuple[Prompt, ...]:
    return tuple(train_prompts(tag))


def sample_example(rng: np.random.Generator, weights: dict[str, float] = TASK_WEIGHTS) -> tuple[Prompt, Scene]:
    """One training prompt and a scene that satisfies it exactly, without a held-out pair."""
    share = np.array(list(weights.values()))
    pool = _pool(str(rng.choice(list(weights), p=share / share.sum())))
    while True:
        prompt = pool[rng.integers(len(pool))]
        scene = sample_scene(wishes(prompt), rng)
        if not shows_held_out(scene):
            return prompt, scene


def misremembered(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene with one slip: an object of another colour or shape, or one left out.

    It is for writing about, not for drawing.
    """
    items = list(scene.objects)
    slipped = int(rng.integers(len(items)))
    kind = rng.integers(3 if len(items) > 1 else 2)
    if kind == 2:
        del items[slipped]
    else:
        name, choices = (("color", tuple(COLORS)), ("shape", BASE_SHAPES))[kind]
        wrong_choices = [choice for choice in choices if choice != getattr(items[slipped], name)]
        items[slipped] = replace(items[slipped], **{name: wrong_choices[rng.integers(len(wrong_choices))]})
    return replace(scene, objects=tuple(items))


def shows_held_out(scene: Scene) -> bool:
    """Whether a pair of its objects is held out (see `suites.pair_split`)."""
    return any(pair_split(pair) != "train" for pair in scene_pairs(scene))


def scene_pairs(scene: Scene) -> list[str]:
    """The unordered pairs of coloured objects in a scene, named as by `suites.object_pairs`."""
    names = [f"{item.color} {item.shape}" for item in scene.objects]
    return [" + ".join(sorted((a, b))) for i, a in enumerate(names) for b in names[i + 1 :]]
