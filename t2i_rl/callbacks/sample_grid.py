"""The same few prompts with the same seeds, drawn again every N steps, with the plans they were drawn from."""

from pathlib import Path

import lightning as L
import numpy as np

from t2i_rl.core.numbers import Count
from t2i_rl.core.pixels import write_png
from t2i_rl.core.seeding import derive_seed
from t2i_rl.core.texts import check_texts
from t2i_rl.evaluation.report.grid import caption_grid


class SampleGrid(L.Callback):
    """Saves `samples/step_XXXXXX.png` before the first step, then every `every_n_steps` optimizer steps.

    W&B gets the same picture.

    Args:
        folder: the run's folder.
        prompts: which prompts; None takes eight of the data module's, evenly spread.

    Raises:
        UserError: there are none, or one is no text.
    """

    def __init__(self, folder: str, every_n_steps: Count = 20, prompts: list[str] | None = None, columns: Count = 4):
        check_texts(prompts, "callbacks.sample_grid.prompts")
        self.folder, self.every_n_steps = Path(folder) / "samples", every_n_steps
        self.prompts, self.columns = prompts, columns
        self.drawn_at = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.prompts is None:
            pool = trainer.datamodule.prompts
            self.prompts = [pool[i].text for i in np.linspace(0, len(pool) - 1, 8).astype(int)]
        self._draw(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step - self.drawn_at >= self.every_n_steps:
            self._draw(trainer, module)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.drawn_at = trainer.global_step
        module.model.prepare()
        if not trainer.is_global_zero:
            return
        seeds = [derive_seed("sample_grid", number) for number in range(len(self.prompts))]
        drawn = module.model.generate(self.prompts, seeds, mode="plan" if module.plan else "direct", fresh=False)
        captions = [
            f"{prompt} | {plan}" if plan else prompt for prompt, plan in zip(self.prompts, drawn.plans, strict=True)
        ]
        grid = caption_grid(
            list(drawn.images), captions, columns=self.columns, scale=max(1, 192 // drawn.images.shape[1])
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_png(self.folder / f"step_{trainer.global_step:06d}.png", grid)
        for logger in trainer.loggers:
            if isinstance(logger, L.pytorch.loggers.WandbLogger):
                logger.log_image("samples", [grid], step=trainer.global_step)
