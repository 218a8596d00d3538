"""Train one stage of a tiny model, resuming whatever its folder already holds."""

import json
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from t2i_rl.evaluation.results import write_atomic


def fit(module: L.LightningModule, stream, steps: int, folder: Path, precision: str, optimizers: int = 1) -> float:
    """Train one stage for `steps` batches, continuing from `folder/last.ckpt`; `stream(first_batch)` feeds it. Returns its minutes so far."""
    last, clock = folder / "last.ckpt", folder / "minutes.json"
    done = torch.load(last, weights_only=True)["global_step"] // optimizers if last.exists() else 0
    spent = json.loads(clock.read_text()) if clock.exists() else 0.0
    if done >= steps:
        module.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
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
        callbacks=[ModelCheckpoint(folder, filename="last", every_n_train_steps=200, enable_version_counter=False)],
        enable_model_summary=False,
    )
    trainer.fit(
        module, DataLoader(stream(done), batch_size=None), ckpt_path=last if last.exists() else None, weights_only=True
    )
    trainer.save_checkpoint(last)
    spent += (time.time() - started) / 60
    write_atomic(clock, json.dumps(spent))
    return spent
