"""The benchmark of the embedded world: GenEval's six tasks on coloured shapes, judged exactly."""

import hashlib
import json

import numpy as np

from t2i_rl.core.contracts import Benchmark, Column, Verdict
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Pixels, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.reflections import named, reflect
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import CANVASES, sample_scene
from t2i_rl.shapes.suites import select_prompts, wishes
from t2i_rl.shapes.text import GENEVAL_TASKS

COUNTING = ("counting",)
COLUMNS = {  # by the kind of defect that each counts
    "malformed": Column("malformed", "malformed images", more_is_better=False),
    "extra": Column("over_counted", "counting: too many", COUNTING, more_is_better=False),
    "missing": Column("under_counted", "counting: too few", COUNTING, more_is_better=False),
}


class Shapes(Benchmark):
    """Held-out prompts of `shapes`, half of them with object pairs that no training prompt names (where a task has
    pairs).

    Args:
        tasks: which tasks; those of GenEval's six among them make `overall` (all, if there is none), others stand under
            their own names.
        prompts_per_task: at most so many prompts of each task; samples_per_prompt: images of each prompt.
        split: `test`, or `validation` to choose settings on; size: canvas in pixels, must be what the model draws.
    """

    name = "shapes"
    version = 2
    needs_meta = ("include",)
    columns = tuple(COLUMNS.values())

    def __init__(
        self,
        tasks: tuple[str, ...] = GENEVAL_TASKS,
        prompts_per_task: Count = 40,
        samples_per_prompt: Count = 2,
        split: str = "test",
        size: Pixels = 32,
    ):
        check_arguments(Shapes, locals(), "benchmark")
        if size not in CANVASES:
            raise UserError(f"benchmark.size must be one of {CANVASES}, not {size}")
        if not tasks:
            raise UserError("benchmark.tasks must not be empty")
        self.tasks, self.split, self.size = tuple(tasks), split, size
        self.prompts_per_task, self.samples_per_prompt = prompts_per_task, samples_per_prompt
        self.image_sizes = (size,)
        self.overall_tasks = tuple(task for task in self.tasks if task in GENEVAL_TASKS) or self.tasks
        self._reference: np.ndarray | None = None
        self._prompts = select_prompts(split, prompts_per_task, self.tasks, size)

    def prompts(self) -> list[Prompt]:
        return self._prompts

    def judge(self, images: np.ndarray, prompts: list[Prompt]) -> list[Verdict]:
        """Verdicts on uint8 images `(N, H, W, 3)`.

        Raises:
            UserError: images of a size that the judge was not made for.
        """
        if images.shape[1:3] != (self.size, self.size):
            drawn = f"{images.shape[2]}x{images.shape[1]}"
            raise UserError(f"benchmark=shapes judges {self.size}x{self.size} images, the model drew {drawn}")
        return [judge(prompt.meta, objects) for prompt, objects in zip(prompts, detect(images), strict=True)]

    def measured(self, prompt: Prompt, verdict: Verdict) -> dict[str, float]:
        """Whether there is something that is no shape, an object too many, an object too few."""
        kinds = {defect.kind for defect in verdict.defects}
        return {column.name: float(kind in kinds) for kind, column in COLUMNS.items()}

    def faults(self, images: np.ndarray, prompts: list[Prompt]) -> list[list[str]]:
        """What is wrong with each picture, in the words that a reflection uses; empty for a right one."""
        rng = np.random.default_rng(0)  # places what a mended scene needs; faults do not depend on it
        pictures = zip(prompts, detect(images), strict=True)
        return [list(reflect(prompt, objects, self.size, rng).faults) for prompt, objects in pictures]

    def named(self, text: str) -> list[str]:
        """See `reflections.named`."""
        return named(text)

    def features(self, images: np.ndarray) -> np.ndarray:
        """What diversity is measured on, float32 `(N, 192)`: the image without its background, averaged over an 8x8
        grid."""
        pixels = images.astype(np.float32) / 255
        border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
        pixels = pixels - np.median(border, axis=1)[:, None, None]
        cell = self.size // 8
        return pixels.reshape(len(images), 8, cell, 8, cell, 3).mean(axis=(2, 4)).reshape(len(images), -1)

    def reference_features(self, count: int = 2000) -> np.ndarray:
        """Features `(count, 192)` of renders of scenes that satisfy this benchmark's prompts, its prompts in turn: what
        pictures are compared with."""
        if self._reference is None or len(self._reference) != count:
            rng, prompts = np.random.default_rng(0), self.prompts()
            scenes = (sample_scene(wishes(prompts[i % len(prompts)]), rng, self.size) for i in range(count))
            self._reference = self.features(np.stack([render(scene) for scene in scenes]))
        return self._reference

    def fingerprint(self) -> dict:
        """What a number of this benchmark depends on."""
        rows = [[prompt.id, prompt.text, prompt.meta] for prompt in self.prompts()]
        return {
            "name": self.name,
            "version": self.version,
            "split": self.split,
            "tasks": list(self.tasks),
            "size": self.size,
            "n_prompts": len(rows),
            "samples_per_prompt": self.samples_per_prompt,
            "prompts_sha256": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
            "judge": "shapes oracle, strict",
        }
