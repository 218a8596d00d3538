"""Trajectories of the six modes from a folder in the published format, mixed by stage, in a resumable order."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset

from t2i_rl.core.errors import UserError
from t2i_rl.core.folders import in_turn
from t2i_rl.core.numbers import Count, Seed, Weight, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.data.base import Data
from t2i_rl.data.pairs import share_of
from t2i_rl.methods.irg.drawing import DrawsInTurns
from t2i_rl.methods.irg.make import Maker
from t2i_rl.methods.irg.toy_format import count_rows, parsed, raw_rows
from t2i_rl.methods.irg.trajectory import MODES, STAGES
from t2i_rl.models.autoregressive.segments import Segment
from t2i_rl.shapes.examples import TASK_WEIGHTS, sample_example


class TrajectoryStream(IterableDataset):
    """Batches of `(place, mode, segments)`. Batch `k` of all ranks is a function of `(seed, k)`: each place draws its
    mode, each mode goes through its rows shard by shard, shards and rows in an order of the epoch's own; one shard a
    mode is in memory, as JSON."""

    def __init__(
        self,
        shards: dict[str, list[tuple[Path, int]]],
        weights: dict[str, float],
        batch_size: int,
        seed: int,
        first: int,
    ):
        self.shards, self.weights, self.batch_size, self.seed, self.position = shards, weights, batch_size, seed, first
        self._open: dict[str, tuple[Path, list[str]]] = {}

    def __iter__(self) -> Iterator[list[tuple[int, str, tuple[Segment, ...]]]]:
        first, share = share_of(self.batch_size)
        taken = Counter(mode for batch in range(self.position) for mode in self._modes(batch))
        while True:
            batch = []
            for place, mode in enumerate(self._modes(self.position)):
                if first <= place < first + share:
                    batch.append((place, mode, self._row(mode, taken[mode])))
                taken[mode] += 1
            self.position += 1
            yield batch

    def _modes(self, batch: int) -> list[str]:
        rng = np.random.default_rng((self.seed, 11, batch))
        share = np.array(list(self.weights.values()))
        return [str(mode) for mode in rng.choice(list(self.weights), self.batch_size, p=share / share.sum())]

    def _row(self, mode: str, number: int) -> tuple[Segment, ...]:
        shards = self.shards[mode]
        epoch, offset = divmod(number, sum(count for _, count in shards))
        order = np.random.default_rng(derive_seed(self.seed, mode, epoch)).permutation(len(shards))
        for shard in order:
            path, count = shards[shard]
            if offset < count:
                break
            offset -= count
        if self._open.get(mode, (None,))[0] != path:
            self._open[mode] = path, list(raw_rows(path))
        within = np.random.default_rng(derive_seed(self.seed, mode, epoch, int(shard))).permutation(count)
        row = int(within[offset])
        return parsed(self._open[mode][1][row], mode, path, row).segments


class Trajectories(Data):
    """IRGL data (arXiv 2509.06945): a folder of `task=make_irgl`, or one in the layout that the released parser reads.

    Args:
        path: the folder.
        stage: 1 (all six modes) or 2 (the two full ones), see `trajectory.STAGES`.
        weights: shares of modes by name, in place of the stage's.
        batch_size: trajectories a step, over all ranks together.
        maker: makes the folder where it is not there, before the first step, with the model as it is then; None: it has
            to be there.
        count: training prompts of `shapes` that the maker gets.

    Raises:
        UserError: no such stage or mode, or nothing to read.
    """

    gives = "trajectories"
    prompts: list[Prompt]

    def __init__(
        self,
        path: str,
        stage: Count = 1,
        weights: dict[str, Weight] | None = None,
        batch_size: Count = 16,
        maker: Maker | None = None,
        count: Count = 4096,
        seed: Seed = 0,
    ):
        super().__init__()
        check_arguments(Trajectories, locals(), "data")
        if stage not in STAGES:
            raise UserError(f"stage must be one of {', '.join(map(str, STAGES))}, not {stage!r}")
        self.weights = {mode: share for mode, share in dict(weights or STAGES[stage]).items() if share}
        unknown = [mode for mode in self.weights if mode not in MODES]
        if unknown or not self.weights:
            raise UserError(
                f"data.weights: there is no mode {unknown[0] if unknown else ''!r}; the modes are {', '.join(MODES)}"
            )
        self.path, self.batch_size, self.maker, self.count, self.seed = Path(path), batch_size, maker, count, seed
        self.prompts = world_prompts(count, seed) if maker is not None else []
        if maker is None:
            self.shards()

    def shards(self) -> dict[str, list[tuple[Path, int]]]:
        """Files of each mode that is learnt, with their rows.

        Raises:
            UserError: a mode has none.
        """
        shards = {
            mode: [(path, count_rows(path)) for path in sorted((self.path / mode).glob("*.parquet"))]
            for mode in self.weights
        }
        lacking = [mode for mode, files in shards.items() if not sum(count for _, count in files)]
        if lacking:
            raise UserError(
                f"data.path={self.path} has no rows of {lacking[0]}: make them with task=make_irgl, or leave the mode "
                "out with data.weights={...}"
            )
        return shards

    def check(self, image_size: int) -> None:
        if self.maker is not None:
            self.maker.check(image_size)

    def prepare_data(self) -> None:
        """Make the folder where it is not there. Lightning calls this on one process of a machine, before any step."""
        trainer = self.trainer
        if self.maker is None or trainer is None or trainer.state.fn != "fit":  # one that goes on to test calls again
            return
        with in_turn(self.path):  # a run that wants the same data waits for the one that makes them
            if not (self.path / "manifest.json").exists():
                Console().print(
                    f"making trajectories of {len(self.prompts)} prompts in {self.path} (once)", soft_wrap=True
                )
            method = self._method()
            model = method.model.to(trainer.strategy.root_device)
            self.maker.make(self.path, model, self.prompts, method.interleaved.fits)

    def train_dataloader(self) -> DataLoader:
        stream = TrajectoryStream(
            self.shards(), self.weights, self.batch_size, self.seed, first=self._method().batches_done
        )
        return DataLoader(stream, batch_size=None)

    def _method(self) -> DrawsInTurns:
        """The method that learns from these: no other takes `trajectories`."""
        assert self.trainer is not None  # Lightning sets it before it calls a hook
        return cast(DrawsInTurns, self.trainer.lightning_module)


def world_prompts(count: int, seed: int) -> list[Prompt]:
    """Training prompts of `shapes`, in the shares that janus_tiny was trained with; those of small tasks come again."""
    rng = np.random.default_rng((seed, 12))
    return [sample_example(rng, TASK_WEIGHTS)[0] for _ in range(count)]
