"""Random states in checkpoints: Lightning 2.6 saves loops, optimizers and callbacks, but no generator."""

import random

import lightning as L
import numpy as np
import torch


class RNGState(L.Callback):
    """Saves Python's, NumPy's, torch's and CUDA's generators of every rank; restores them when training starts again.

    A rank that the checkpoint does not know (resumed with more processes) keeps the state it was seeded with.
    """

    def __init__(self):
        self.saved: list[dict] = []

    def state_dict(self) -> dict:
        if not torch.distributed.is_initialized():
            return {"ranks": [generators()]}
        ranks: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, generators())
        return {"ranks": ranks}

    def load_state_dict(self, state: dict) -> None:
        self.saved = state["ranks"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_rank < len(self.saved):
            set_generators(self.saved[trainer.global_rank])
        self.saved = []


def generators() -> dict:
    """The state of every generator of this process, as lists and tensors (which `weights_only=True` loads)."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generators(state: dict) -> None:
    """Put every generator of this process into a state that `generators` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
