"""Train each pair method for two steps on one or two ranks, and save what it learnt and what it measures.

    python -m tests.support.pair_ranks <pipeline> <ranks> <file>

It is a program of its own, because transformers' text encoders do not survive the pickling that
spawned ranks need.
"""

import sys
import tempfile
from functools import partial

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from t2i_rl.data.pairs import ShapesStream
from t2i_rl.evaluation.fid import frechet_distance
from t2i_rl.methods.pairs.agsm import AGSM
from t2i_rl.methods.pairs.denoising import Denoising
from t2i_rl.methods.pairs.softrepa import SoftREPA
from t2i_rl.models.diffusion.sd3 import SD3

CASES = {
    # At a temperature of 0.07 an untrained model has no gradient.
    "softrepa": (SoftREPA, {"gather_negatives": True, "temperature": 1.0}),
    "agsm": (AGSM, {"gather_negatives": True, "times": "shared", "noise": "shared"}),
    "lora": (Denoising, {"tokens": 0, "lora": {"r": 2, "target_modules": ["to_k", "to_v"]}}),
}


class FourPairs(L.LightningDataModule):
    """The same stream of pairs whatever the number of ranks."""

    def train_dataloader(self):
        first = self.trainer.lightning_module.batches_done
        return DataLoader(ShapesStream(4, {"colors": 0.5, "color_attr": 0.5}, 0, first), batch_size=None)


def fit(module, steps: int, ranks: int = 1, ckpt=None, save=None, folder=None) -> dict[str, torch.Tensor]:
    """The state after `steps` optimizer steps."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder or tempfile.mkdtemp(),
    )
    trainer.fit(module, FourPairs(), ckpt_path=ckpt, weights_only=True)
    if save is not None:
        trainer.save_checkpoint(save)
    return {name: value.clone() for name, value in module.state_dict().items()}


def main(folder: str, ranks: str, file: str) -> None:
    learnt = {}
    for name, (method, options) in CASES.items():
        model = SD3(folder, max_sequence_length=2)
        module = method(model, partial(torch.optim.SGD, lr=1.0), max_grad_norm=None, pairs_per_pass=3, **options)
        learnt |= {f"start/{name}/{key}": value.clone() for key, value in module.state_dict().items()}
        learnt |= {f"{name}/{key}": value for key, value in fit(module, 2, int(ranks)).items()}
    features = np.random.default_rng(0).normal(size=(40, 3))
    learnt["fid"] = torch.tensor(frechet_distance(features[:15], features[15:] * 2))  # every rank holds all rows
    torch.save(learnt, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
