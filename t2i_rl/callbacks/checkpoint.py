"""Checkpoints by optimizer step, at the end of a rollout, and upon Ctrl-C or SIGTERM."""

from pathlib import Path

import lightning as L

from t2i_rl.core import stopping
from t2i_rl.core.numbers import Count


class CheckpointEvery(L.pytorch.callbacks.Checkpoint):
    """Keeps `last.ckpt` no older than `every_n_steps` optimizer steps, and `step_*.ckpt` every `keep_every_n_steps`.

    Saves between rollouts, however many optimizer steps a rollout takes (Lightning's ModelCheckpoint skips a step
    number that is jumped over). Ctrl-C or SIGTERM, to any of the ranks, saves at the end of the running step on all of
    them; Lightning then stops the run. Lightning's own handler for SIGTERM broadcasts from within the signal, which can
    meet another collective half-way, so it is replaced while training (that for SIGUSR1, upon which Lightning requeues
    a job of Slurm, stays). `WholeCheckpoints` (trainer.plugins) writes them, and keeps what was `last.ckpt` as
    `previous.ckpt`.
    """

    def __init__(self, folder: str, every_n_steps: Count = 10, keep_every_n_steps: Count | None = None):
        self.folder, self.every_n_steps, self.keep_every_n_steps = Path(folder), every_n_steps, keep_every_n_steps
        self.last = self.last_kept = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last = self.last_kept = trainer.global_step
        stopping.listen()
        stopping.save_first(True)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        if self.keep_every_n_steps and step - self.last_kept >= self.keep_every_n_steps:
            trainer.save_checkpoint(self.folder / f"step_{step:06d}.ckpt")
            self.last_kept = step
        stop = self._asked_to_stop(trainer)
        if stop or step - self.last >= self.every_n_steps:
            self._save(trainer)
        if stop:
            trainer._signal_connector.received_sigterm = True  # on every rank, so that all stop after this very step

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step > self.last:
            self._save(trainer)
        stopping.save_first(False)
        if self._asked_to_stop(trainer):  # after the last step
            raise SystemExit(stopping.exit_code())

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        stopping.save_first(False)

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        """Whether any rank was; every rank must call it."""
        asked = stopping.asked() is not None or trainer.received_sigterm
        return trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.last = trainer.global_step
