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


def fit(module: L.LightningModule, stream, steps: int, folder: Path, precision: str, optimizers: int = 1) -> float:
    """Train one stage for `steps` batches, continuing from `folder/last.ckpt`; `stream(first_batch)` feeds it.

    Returns its minutes so far.

    Raises:
        UserError: a gradient or a weight is not finite; the checkpoint before that step is kept.
    """
    last, clock = folder / LAST, folder / "minutes.json"
    start = newest_whole(folder) if last.exists() or (folder / PREVIOUS).exists() else None
    done = read_checkpoint(start)["global_step"] // optimizers if start else 0
    spent = read_json(clock) if clock.exists() else 0.0
    if done >= steps:
        module.load_state_dict(read_checkpoint(start)["state_dict"])
        check_weights(module.named_parameters(), str(start), f"delete {folder}, to train this stage again")
        return spent
    started = time.time()
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_steps=steps * optimizers,
        precision=precision,
        gradient_clip_val=1.0 if module.automatic_optimization else None,
        logger=L.pytorch.loggers.CSVLogger(folder, name="", version=""),
        log_every_n_steps=10,
        callbacks=[CheckpointEvery(folder, every_n_steps=200), Progress(), StopsUnlessFinite()],
        enable_model_summary=False,
        plugins=[WholeCheckpoints()],
    )
    trainer.fit(module, DataLoader(stream(done), batch_size=None), ckpt_path=start, weights_only=True)
    check_weights(module.named_parameters(), f"stage {folder.name}", LOWER_RATE)
    trainer.save_checkpoint(last)
    spent += (time.time() - started) / 60
    write_atomic(clock, json.dumps(spent))
    return spent
