"""Both turns drawn on held-back prompts while training, judged, and shown as strips."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist

from t2i_rl.core.contract_checks import verdicts_of
from t2i_rl.core.contracts import Benchmark, Judging
from t2i_rl.core.files import write_atomic
from t2i_rl.core.numbers import Count
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.core.texts import check_texts
from t2i_rl.methods.irg.evaluation import reflected, reflection_metrics
from t2i_rl.methods.irg.strips import strips
from t2i_rl.methods.irg.toy_format import png
from t2i_rl.methods.irg.trajectory import Trajectory


class WatchTurns(Judging, L.Callback):
    """With the weights that would be evaluated: before the first step, every `every_n_steps`, and at the end.

    Logs `val/turn<k>` (strict accuracy of the k-th picture) and, of the last reflection, what
    `evaluation.reflection_metrics` measures; saves `samples/step_<number>.png`, the strips of `strips` prompts, spread
    evenly over all.

    Args:
        benchmark: its prompts are drawn once each, with the same seeds every time; None draws `prompts` and judges
            nothing.
        batch_size: trajectories drawn together.
    """

    def __init__(
        self,
        folder: str,
        benchmark: Benchmark | None = None,
        prompts: list[str] | None = None,
        every_n_steps: Count = 100,
        strips: Count = 6,
        batch_size: Count = 64,
    ):
        self.folder, self.benchmark, self.every_n_steps = Path(folder) / "samples", benchmark, every_n_steps
        self.strips, self.batch_size, self.drawn_at = strips, batch_size, -1
        check_texts(prompts, "callbacks.sample_grid.prompts")
        self.prompts = benchmark.prompts() if benchmark is not None else [Prompt(text, text) for text in prompts or ()]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.drawn_at < 0:
            self._draw(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        at_the_end = 0 < trainer.max_steps <= trainer.global_step  # judged before it is saved: a run may stop in it
        if at_the_end or trainer.global_step - self.drawn_at >= self.every_n_steps:
            self._draw(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step > self.drawn_at:
            self._draw(trainer, module)

    @torch.no_grad()
    def _draw(self, trainer: L.Trainer, module: Any) -> None:
        self.drawn_at = trainer.global_step
        if not self.prompts:
            return
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine, drawn = list(enumerate(self.prompts))[rank::world], []
        with module.averaged():
            module.interleaved.prepare()
        for first in range(0, len(mine), self.batch_size):
            part = mine[first : first + self.batch_size]
            seeds = [derive_seed("validate", prompt.id) for _, prompt in part]
            rows = module.interleave.every_round().run(module.interleaved, [prompt.text for _, prompt in part], seeds)
            drawn += [(number, prompt, row) for (number, prompt), row in zip(part, rows, strict=True)]
        module.interleaved.done()
        verdicts = self._judge(drawn)
        if world > 1:
            parts: list = [None] * world
            dist.all_gather_object(parts, (drawn, verdicts))
            drawn, verdicts = ([row for part in parts for row in part[which]] for which in (0, 1))
        if trainer.is_global_zero:
            self._log(trainer, verdicts)
            self._save(trainer, drawn, verdicts)

    def _judge(self, drawn: list[tuple[int, Prompt, Trajectory]]) -> list[list[dict]]:
        """For each trajectory, of each picture what `reflection_metrics` reads."""
        if self.benchmark is None or not drawn:
            return []
        prompts, trajectories = [prompt for _, prompt, _ in drawn], [trajectory for _, _, trajectory in drawn]
        by_turn = []
        for turn in range(len(trajectories[0].images)):
            verdicts = verdicts_of(self.benchmark, np.stack([row.images[turn] for row in trajectories]), prompts)
            said = reflected(self.benchmark, prompts, trajectories, turn)
            by_turn.append(
                [
                    {"prompt_id": prompt.id, "sample_index": 0, "strict": verdict.strict, **words}
                    for prompt, verdict, words in zip(prompts, verdicts, said, strict=True)
                ]
            )
        return [list(row) for row in zip(*by_turn, strict=True)]

    def _log(self, trainer: L.Trainer, verdicts: list[list[dict]]) -> None:
        if not verdicts:
            return
        turns = list(zip(*verdicts, strict=True))
        metrics = {
            f"turn{number}": np.mean([row["strict"] for row in turn]) for number, turn in enumerate(turns, start=1)
        }
        if len(turns) > 1:
            reflections = reflection_metrics(turns[-2], turns[-1], resamples=1)
            metrics |= {name: cell["mean"] for name, cell in reflections.items()}
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": float(value) for name, value in metrics.items()}, trainer.global_step)

    def _save(self, trainer: L.Trainer, drawn: list, verdicts: list[list[dict]]) -> None:
        order = sorted(range(len(drawn)), key=lambda row: drawn[row][0])
        shown = [order[i] for i in np.linspace(0, len(order) - 1, min(self.strips, len(order))).astype(int)]
        judged = [[turn["strict"] for turn in verdicts[i]] for i in shown] if verdicts else None
        picture = strips([drawn[i][2] for i in shown], judged)
        write_atomic(self.folder / f"step_{trainer.global_step:06d}.png", png(np.asarray(picture)))
        for logger in trainer.loggers:
            if isinstance(logger, L.pytorch.loggers.WandbLogger):
                logger.log_image("samples", [picture], step=trainer.global_step)

    def state_dict(self) -> dict:
        return {"drawn_at": self.drawn_at}

    def load_state_dict(self, state: dict) -> None:
        self.drawn_at = state["drawn_at"]
