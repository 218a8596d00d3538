"""Train one stage of a tiny model, resuming whatever its folder already holds."""

import json
import math
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from t2i_rl.callbacks.checkpoint import CheckpointEvery
from t2i_rl.callbacks.progress import Progress
from t2i_rl.core.checkpoint_io import WholeCheckpoints
from t2i_rl.core.checkpoints import LAST, PREVIOUS, newest_whole, read_checkpoint
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.core.finite import check_weights

LOWER_RATE = (
    "lower this stage's learning rates (task.recipes), or take precision=32-true; the same command goes on from its "
    "last checkpoint"
)


class StopsUnlessFinite(L.Callback):
    """Ends a run before a step along a gradient that is not finite; a manual step has clipped it by then, to NaN."""

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer) -> None:
        learning = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm([weight.grad for weight in learning]))
        if not math.isfinite(norm):
            raise UserError(f"the gradient norm is {norm} at step {trainer.global_step}: {LOWER_RATE}")


class EndsByTheClock(L.Callback):
    """Ends a stage when its minutes are over, if its steps are not over before.

    After every batch `trainer.max_steps` becomes what the pace since batch `WARM` lets the stage reach. Learning rates
    fall towards that number, so they are down when the time is up, however fast the machine is.
    """

    WARM = 10  # batches that are left out of the pace: the first ones wait for memory, kernels and workers

    def __init__(self, minutes: float, optimizers: int):
        self.seconds, self.optimizers = 60 * minutes, optimizers

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.started, self.most, self.batches = time.monotonic(), trainer.max_steps, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        self.batches += 1
        spent = time.monotonic() - self.started
        if self.batches <= self.WARM:
            self.spent_warm = spent
        if spent >= self.seconds:
            batches_left = 0
        elif self.batches > self.WARM:
            pace = (spent - self.spent_warm) / (self.batches - self.WARM)
            batches_left = int((self.seconds - spent) / pace)
        else:
            return
        reached = trainer.global_step + batches_left * self.optimizers
        trainer.fit_loop.epoch_loop.max_steps = min(self.most, reached)


def share_of_minutes(minutes: float | None, steps: int, steps_of_all: int) -> float | None:
    """A stage's part of the minutes that all stages have together, in proportion to its steps; None: no bound."""
    return None if minutes is None else minutes * steps / steps_of_all


def fit(
    module: L.LightningModule,
    stream,
    steps: int,
    folder: Path,
    precision: str,
    optimizers: int = 1,
    workers: int = 0,
    minutes: float | None = None,
) -> float:
    """Train one stage for `steps` batches, continuing from `folder/last.ckpt`; `stream(first_batch)` feeds it.

    Args:
        optimizers: of the stage; Lightning counts a step for each.
        workers: processes that make the batches, in turn; 0: this one makes them.
        minutes: a bound of this stage, see `EndsByTheClock`; a stage that was killed has all of them again.

    Returns its minutes so far.

    Raises:
        UserError: a gradient or a weight is not finite; the checkpoint before that step is kept.
    """
    last, clock = folder / LAST, folder / "minutes.json"
    start = newest_whole(folder) if last.exists() or (folder / PREVIOUS).exists() else None
    done = read_checkpoint(start)["global_step"] // optimizers if start else 0
    spent = read_json(clock) if clock.exists() else 0.0
    if done >= steps or (minutes is not None and clock.exists()):  # the clock is written when a stage has ended
        module.load_state_dict(read_checkpoint(start)["state_dict"])
        check_weights(module.named_parameters(), str(start), f"delete {folder}, to train this stage again")
        return spent
    started = time.time()
    bounds = [] if minutes is None else [EndsByTheClock(minutes, optimizers)]
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_steps=steps * optimizers,
        precision=precision,
        gradient_clip_val=1.0 if module.automatic_optimization else None,
        logger=L.pytorch.loggers.CSVLogger(folder, name="", version=""),
        log_every_n_steps=10,
        callbacks=[CheckpointEvery(folder, every_n_steps=200), Progress(), StopsUnlessFinite(), *bounds],
        enable_model_summary=False,
        plugins=[WholeCheckpoints()],
    )
    loader = DataLoader(stream(done), batch_size=None, num_workers=workers)
    trainer.fit(module, loader, ckpt_path=start, weights_only=True)
    check_weights(module.named_parameters(), f"stage {folder.name}", LOWER_RATE)
    trainer.save_checkpoint(last)
    spent += (time.time() - started) / 60
    write_atomic(clock, json.dumps(spent))
    return spent
