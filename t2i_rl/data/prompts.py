"""An endless, seeded stream of prompt batches that a resumed run continues."""

from collections.abc import Iterator

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Seed, check_arguments
from t2i_rl.core.prompts import Prompt, read_prompts
from t2i_rl.core.seeding import derive_seed
from t2i_rl.data.base import Data
from t2i_rl.shapes.suites import select_prompts
from t2i_rl.shapes.text import GENEVAL_TASKS


class PromptBatches(IterableDataset):
    """Batches of `(index, prompt)`, each of which is one rollout.

    Every epoch is its own permutation; batch `k` of the global stream is split evenly over ranks.
    """

    def __init__(
        self, prompts: list[Prompt], batch_size: int, seed: int, first: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.prompts, self.batch_size, self.seed, self.first = prompts, batch_size, seed, first
        self.rank, self.world_size = rank, world_size
        self._epoch: int | None = None  # of which `_order` is
        self._order: list[int] = []

    def __iter__(self) -> Iterator[list[tuple[int, Prompt]]]:
        number = self.first
        share = self.batch_size // self.world_size
        while True:
            start = number * self.batch_size + self.rank * share
            indices = [self._index(draw) for draw in range(start, start + share)]
            yield [(index, self.prompts[index]) for index in indices]
            number += 1

    def _index(self, draw: int) -> int:
        """The number of the prompt that is drawn as number `draw` of the endless stream."""
        epoch, offset = divmod(draw, len(self.prompts))
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = sorted(range(len(self.prompts)), key=lambda i: derive_seed(self.seed, "order", epoch, i))
        return self._order[offset]


class PromptData(Data):
    """Training prompts from a file, or from the training side of `shapes`.

    Args:
        path: a prompt file; None takes `shapes`.
        batch_size: prompts per rollout over all ranks together.
        prompts_per_task: how many training prompts of each `shapes` task.
        tasks: the tasks of `shapes`.
        prompts: the prompts themselves, in place of all that.
        split: of `shapes`; what trains takes `train`.

    Raises:
        UserError: the file is broken, or there are fewer prompts than one batch asks for.
    """

    def __init__(
        self,
        path: str | None = None,
        batch_size: Count = 8,
        prompts_per_task: Count = 400,
        tasks: tuple[str, ...] = GENEVAL_TASKS,
        seed: Seed = 0,
        prompts: list[Prompt] | None = None,
        split: str = "train",
    ):
        super().__init__()
        self.prompts = prompts
        check_arguments(PromptData, locals(), "data")
        if prompts is None and not path and not tasks:
            raise UserError("data.tasks must not be empty")
        if prompts is None:
            self.prompts = read_prompts(path) if path else select_prompts(split, prompts_per_task, tuple(tasks))
        self.batch_size, self.seed = batch_size, seed
        if len(self.prompts) < batch_size:
            count = len(self.prompts)
            raise UserError(f"data.batch_size={batch_size} prompts a rollout, but there are only {count} prompts")

    def train_dataloader(self) -> DataLoader:
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.batch_size % world_size:
            size = f"data.batch_size={self.batch_size}"
            raise UserError(f"{size} prompts do not split over {world_size} ranks: take a multiple")
        first = self.trainer.lightning_module.rollouts_done
        batches = PromptBatches(self.prompts, self.batch_size, self.seed, first, rank, world_size)
        return DataLoader(batches, batch_size=None)
