"""Random states in checkpoints: Lightning 2.6 saves loops, optimizers and callbacks, but no generator."""

import random

import lightning as L
import numpy as np
import torch


class RNGState(L.Callback):
    """Saves Python's, NumPy's, torch's and CUDA's generators of the main process; restores them when training starts again."""

    def __init__(self):
        self.saved: dict | None = None

    def state_dict(self) -> dict:
        name, keys, position, has_gauss, cached = np.random.get_state()
        version, internal, gauss_next = random.getstate()
        return {
            "python": [version, list(internal), gauss_next],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict) -> None:
        self.saved = state

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.saved is None:
            return
        version, internal, gauss_next = self.saved["python"]
        random.setstate((version, tuple(internal), gauss_next))
        name, keys, *rest = self.saved["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(self.saved["torch"])
        if self.saved["cuda"] and len(self.saved["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(self.saved["cuda"])
        self.saved = None
