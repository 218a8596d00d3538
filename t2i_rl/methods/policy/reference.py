"""The frozen model that the KL is taken to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from t2i_rl.core.contracts import ImageModel
from t2i_rl.core.hashing import weights_sha256

Model = TypeVar("Model", bound=ImageModel)


class Reference(Generic[Model]):
    """The model as it was before training: its adapters switched off under LoRA, else a frozen copy with embeddings of
    its own.

    Deliberately no submodule of whatever holds it: it is neither trained, nor wrapped, nor saved; checkpoints carry its
    hash. `offload` keeps the copy in the CPU's memory while it is not scoring.
    """

    def __init__(self, model: Model, offload: bool = False):
        self.adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.sha256 = weights_sha256(model, adapters=False)
        self.twin: Model | None = None if self.adapters else model.twin()
        self.offload = offload

    @contextmanager
    def scoring(self, model: Model) -> Iterator[Model]:
        """The reference, on the device of `model`, with no gradient."""
        with torch.no_grad():
            if self.twin is not None:
                yield self.twin.to(model.device)
                if self.offload:
                    self.twin.to("cpu")
                return
            for layer in self.adapters:
                layer._disable_adapters = True
            try:
                yield model
            finally:
                for layer in self.adapters:
                    layer._disable_adapters = False
