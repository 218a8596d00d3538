"""Progress in optimizer steps: Lightning's rich bar in a terminal, a line now and then where there is none."""

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from t2i_rl.core.numbers import Weight
from t2i_rl.core.progress import SECONDS, Lines, watched


class Progress(RichProgressBar):
    """Data streams have no end, so steps are counted and not epochs; a resumed run begins at the step that it resumes
    from.

    Args:
        every_seconds: between two lines, where nobody watches.
    """

    def __init__(self, every_seconds: Weight = SECONDS):
        super().__init__()
        self.every_seconds = every_seconds
        self.lines: Lines | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        self.lines = None
        if not watched():
            self.disable()

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self.trainer.max_steps > 0 else float("inf")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        self.lines = self._lines("training", steps, "step", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        # Lightning's bar counts batches, of which one may take several steps: it is told the step's number in place of
        # the batch's
        super().on_train_batch_end(trainer, module, outputs, batch, trainer.global_step - 1)
        if self.lines is not None:
            measured = {name: value for name, value in self.get_metrics(trainer, module).items() if name != "v_num"}
            facts = ", ".join(f"{name} {float(value):.4g}" for name, value in measured.items())
            self.lines.say(trainer.global_step, facts)

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_test_start(trainer, module)
        self.lines = self._lines("drawing", sum(trainer.num_test_batches), "batch", 0)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        super().on_test_batch_end(trainer, module, outputs, batch, batch_idx, dataloader_idx)
        if self.lines is not None:
            self.lines.say(batch_idx + 1)

    def _lines(self, name: str, total: int | None, unit: str, done: int) -> Lines | None:
        writes = self.trainer.is_global_zero and not watched()
        return Lines(name, total, unit, done, self.every_seconds) if writes else None

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
