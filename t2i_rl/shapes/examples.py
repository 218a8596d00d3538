"""An endless, seeded stream of (prompt, scene) examples from the training side of the world."""

from functools import cache

import numpy as np

from t2i_rl.prompts import Prompt
from t2i_rl.shapes.scene import Scene, sample_scene
from t2i_rl.shapes.suites import pair_held_out, train_prompts, wishes

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
    """One training prompt and a scene that satisfies it exactly and holds no held-out pair of objects."""
    share = np.array(list(weights.values()))
    pool = _pool(str(rng.choice(list(weights), p=share / share.sum())))
    while True:
        prompt = pool[rng.integers(len(pool))]
        scene = sample_scene(wishes(prompt), rng)
        if not any(pair_held_out(pair) for pair in scene_pairs(scene)):
            return prompt, scene


def scene_pairs(scene: Scene) -> list[str]:
    """The unordered pairs of coloured objects in a scene, named as `suites.object_pairs` names them."""
    names = [f"{item.color} {item.shape}" for item in scene.objects]
    return [" + ".join(sorted((a, b))) for i, a in enumerate(names) for b in names[i + 1 :]]
