"""Checkpoints by optimizer step, at the end of a rollout, and upon SIGTERM."""

from pathlib import Path

import lightning as L


class CheckpointEvery(L.pytorch.callbacks.Checkpoint):
    """Keeps `last.ckpt` no older than `every_n_steps` optimizer steps, and `step_*.ckpt` every `keep_every_n_steps`.

    Saves between rollouts, however many optimizer steps a rollout takes (Lightning's ModelCheckpoint skips a step number that is jumped over).
    SIGTERM saves at the end of the running step; Lightning then stops the run. Lightning writes checkpoints atomically.
    """

    def __init__(self, folder: str, every_n_steps: int = 10, keep_every_n_steps: int | None = None):
        self.folder, self.every_n_steps, self.keep_every_n_steps = Path(folder), every_n_steps, keep_every_n_steps
        self.last = self.kept = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last = self.kept = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        if self.keep_every_n_steps and step - self.kept >= self.keep_every_n_steps:
            trainer.save_checkpoint(self.folder / f"step_{step:06d}.ckpt")
            self.kept = step
        if step - self.last >= self.every_n_steps or trainer.received_sigterm:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step > self.last:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.last = trainer.global_step
