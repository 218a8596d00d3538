"""Batches of image-text pairs, and `shapes_pairs`: an endless stream of rendered scenes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Seed, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import row_normals
from t2i_rl.data.base import Data
from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding
from t2i_rl.shapes.examples import TASK_WEIGHTS, sample_example
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import ShapeDetection
from t2i_rl.shapes.render import render, to_pixels
from t2i_rl.shapes.scene import Scene
from t2i_rl.shapes.suites import select_prompts


@dataclass
class PixelPairs:
    """This rank's share of a batch.

    `numbers` are its rows' numbers in the batch of all ranks; pixels float32 `(R, 3, H, W)` in
    [-1, 1].
    """

    numbers: list[int]
    captions: list[str]
    pixels: torch.Tensor

    def encode(self, model: LatentDiffusion, seeds: list[int]) -> tuple[torch.Tensor, TextEncoding]:
        """Latents `(R, C, h, w)`, row `i` sampled with `seeds[i]`, and texts."""
        return sampled_latents(model, self.pixels, seeds), model.encode_prompts(self.captions)

    def to(self, device: torch.device | str) -> "PixelPairs":
        return PixelPairs(self.numbers, self.captions, self.pixels.to(device))


def sampled_latents(model: LatentDiffusion, pixels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    """Latents `(B, C, h, w)` of pixels; row `i` is sampled from its posterior with `seeds[i]`."""
    mean, std = model.posterior(pixels)
    return model.scaled(mean + std * row_normals(seeds, mean.shape[1:]).to(mean))


def share_of(batch_size: int) -> tuple[int, int]:
    """The first row of this rank in a batch of all ranks, and how many rows are its own.

    Raises:
        UserError: the batch does not split.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if batch_size % world_size:
        raise UserError(f"data.batch_size={batch_size} pairs do not split over {world_size} ranks: take a multiple")
    share = batch_size // world_size
    return rank * share, share


def as_found(scene: Scene) -> list[ShapeDetection]:
    """A scene as a detector without error would report it."""
    return [ShapeDetection(item.shape, item.box, 1.0, item.color, item.texture) for item in scene.objects]


def distinct_examples(rng: np.random.Generator, count: int, weights: dict[str, float]) -> list[tuple[Prompt, Scene]]:
    """Examples of which no caption is true of another's scene.

    A contrasted text must not be a false negative.

    Raises:
        UserError: these tasks have not so many.
    """
    examples: list[tuple[Prompt, Scene]] = []
    clashes_in_a_row = 0
    while len(examples) < count:
        if clashes_in_a_row > 1000:
            raise UserError(
                f"data.batch_size={count}: data.tasks={list(weights)} have only about {len(examples)} captions that "
                "are not true of one another's pictures; take fewer pairs, or more tasks"
            )
        example = sample_example(rng, weights)
        if any(_is_true_of(example, other) or _is_true_of(other, example) for other in examples):
            clashes_in_a_row += 1
        else:
            clashes_in_a_row = 0
            examples.append(example)
    return examples


def _is_true_of(example: tuple[Prompt, Scene], other: tuple[Prompt, Scene]) -> bool:
    """Whether one example's caption is true of another's scene."""
    return judge(example[0].meta, as_found(other[1])).strict


class ShapesStream(IterableDataset):
    """Batch `k` of all ranks together is a function of `(seed, k)`; a rank takes its share."""

    def __init__(self, batch_size: int, weights: dict[str, float], seed: int, first: int):
        self.batch_size, self.weights, self.seed, self.position = batch_size, weights, seed, first

    def __iter__(self) -> Iterator[PixelPairs]:
        first, share = share_of(self.batch_size)
        while True:
            rng = np.random.default_rng((self.seed, 5, self.position))
            examples = distinct_examples(rng, self.batch_size, self.weights)[first : first + share]
            self.position += 1
            yield PixelPairs(
                list(range(first, first + share)),
                [prompt.text for prompt, _ in examples],
                to_pixels(np.stack([render(scene) for _, scene in examples])),
            )


class ShapesPairs(Data):
    """Training pairs of the embedded world, rendered on the fly.

    Args:
        batch_size: pairs a step, over all ranks together: B images under B texts.
        tasks: which tasks the captions come from, in the shares of `shapes.examples.TASK_WEIGHTS`.

    Raises:
        UserError: fewer than two pairs (nothing to contrast), more than the tasks have captions
            for, or no such task.
    """

    gives = "pairs"

    def __init__(self, batch_size: Count = 8, tasks: tuple[str, ...] = tuple(TASK_WEIGHTS)[:6], seed: Seed = 0):
        super().__init__()
        check_arguments(ShapesPairs, locals(), "data")
        unknown = [task for task in tasks if task not in TASK_WEIGHTS]
        if unknown or not tasks:
            raise UserError(f"data.tasks must be some of {', '.join(TASK_WEIGHTS)}, not {unknown or list(tasks)}")
        if batch_size < 2:
            why = "a text needs at least one other to be told from"
            raise UserError(f"data.batch_size={batch_size}: {why}; take 2 or more")
        self.batch_size, self.seed = batch_size, seed
        self.weights = {task: TASK_WEIGHTS[task] for task in tasks}
        self.prompts = select_prompts("train", 40, tuple(tasks))
        distinct_examples(np.random.default_rng(seed), batch_size, self.weights)  # there are so many

    def train_dataloader(self) -> DataLoader:
        first = self.trainer.lightning_module.batches_done
        return DataLoader(ShapesStream(self.batch_size, self.weights, self.seed, first), batch_size=None)
