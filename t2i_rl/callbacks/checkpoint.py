"""Checkpoints by optimizer step, at the end of a rollout, and upon SIGTERM."""

import signal
from pathlib import Path

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only


class CheckpointEvery(L.pytorch.callbacks.Checkpoint):
    """Keeps `last.ckpt` no older than `every_n_steps` optimizer steps, and `step_*.ckpt` every `keep_every_n_steps`.

    Saves between rollouts, however many optimizer steps a rollout takes (Lightning's ModelCheckpoint skips a step number that is jumped over).
    SIGTERM, to any of the ranks, saves at the end of the running step on all of them; Lightning then stops the run. Lightning's own
    handler broadcasts from within the signal, which can meet another collective half-way, so it is replaced while training
    (not under SLURM, where Lightning requeues). Lightning writes checkpoints atomically.
    """

    def __init__(self, folder: str, every_n_steps: int = 10, keep_every_n_steps: int | None = None):
        self.folder, self.every_n_steps, self.keep_every_n_steps = Path(folder), every_n_steps, keep_every_n_steps
        self.last = self.kept = 0
        self.asked_to_stop = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last = self.kept = trainer.global_step
        if not SLURMEnvironment.detect():
            signal.signal(signal.SIGTERM, self._ask_to_stop)  # Lightning puts the former handler back

    def _ask_to_stop(self, signum: int, frame) -> None:
        self.asked_to_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        if self.keep_every_n_steps and step - self.kept >= self.keep_every_n_steps:
            trainer.save_checkpoint(self.folder / f"step_{step:06d}.ckpt")
            self.kept = step
        stop = trainer.strategy.reduce_boolean_decision(self.asked_to_stop or trainer.received_sigterm, all=False)
        if stop or step - self.last >= self.every_n_steps:
            self._save(trainer)
        if stop:
            rank_zero_only(print)(
                f"SIGTERM: saved {self.folder / 'last.ckpt'}; ckpt_path=last goes on from it", flush=True
            )
            trainer._signal_connector.received_sigterm = True  # on every rank, so that all stop after this very step

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step > self.last:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.last = trainer.global_step
