"""The teacher on `shapes`: what the world itself says of a prompt, and of a picture that was drawn for it."""

from collections.abc import Sequence

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Pixels
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.shapes.examples import shows_held_out
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.reflections import NO_CHANGE, as_object, reflect
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import Scene, sample_scene
from t2i_rl.shapes.suites import held_out, wishes
from t2i_rl.shapes.text import plan


class World:
    """Plans and renders of scenes that are as asked; reflections from the oracle's findings, and renders that keep what
    was right.

    Args:
        size: side in pixels of the pictures.
    """

    stop = NO_CHANGE
    questions = {"think": "describe the picture.", "reflect": "draw the right picture."}  # words of janus_tiny

    def __init__(self, size: Pixels = 32):
        self.size, self.image_sizes = size, (size,)

    def check(self, prompts: list[Prompt]) -> None:
        """Refuse prompts that are not the world's.

        Raises:
            UserError: one line that names the first.
        """
        unseen = next((prompt for prompt in prompts if "include" in prompt.meta and held_out(prompt)), None)
        if unseen:
            raise UserError(
                f"{unseen.text!r} names a pair of objects that is kept for the test prompts: take training prompts "
                "(task=make_prompts)"
            )
        foreign = next((prompt for prompt in prompts if "include" not in prompt.meta), None)
        if foreign:
            raise UserError(
                f"task.teacher=world knows the prompts of `shapes`, and {foreign.text!r} has no 'include': take "
                "task/teacher=chat or local"
            )

    def settings(self) -> dict:
        return {"name": "world", "size": self.size}

    def inconsistent(self, prompts: list[Prompt], pictures: list[np.ndarray]) -> list[str | None]:
        """What speaks against each picture: the oracle finds something other than what the prompt asks for, or a
        held-out pair of objects."""
        why = []
        for prompt, objects in zip(prompts, detect(np.stack(pictures)) if pictures else (), strict=True):
            wrong = not judge(prompt.meta, objects).strict
            unseen = shows_held_out(Scene(tuple(as_object(item, self.size) for item in objects), self.size))
            why.append("picture and prompt disagree" if wrong else "a held-out pair of objects" if unseen else None)
        return why

    def initial(self, prompts: list[Prompt], seeds: list[int]) -> list[tuple[str, np.ndarray]]:
        """A plan and a picture for each prompt; none of the held-out pairs of objects is in them."""
        plans = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(derive_seed(seed, "initial"))
            scene = sample_scene(wishes(prompt), rng, self.size)
            while shows_held_out(scene):
                scene = sample_scene(wishes(prompt), rng, self.size)
            plans.append((plan(scene), render(scene)))
        return plans

    def improve(
        self, prompts: list[Prompt], weak: np.ndarray, good: Sequence[np.ndarray], seeds: list[int]
    ) -> list[tuple[str, np.ndarray]]:
        """A reflection on each weak picture uint8 `(B, H, W, 3)`, and the picture that mends it: itself where nothing
        is wrong, code for code."""
        reflections = []
        for prompt, image, objects, seed in zip(prompts, weak, detect(weak), seeds, strict=True):
            reflection = reflect(prompt, objects, self.size, np.random.default_rng(derive_seed(seed, "improve")))
            reflections.append((reflection.text, render(reflection.scene) if reflection.faults else image))
        return reflections
