"""How much memory optimising a model's noise will take, from its config files alone.

Its modules are built without values and run on shapes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from t2i_rl.core import loading
from t2i_rl.models.diffusion.base import LatentDiffusion
from t2i_rl.models.diffusion.noise_to_image import enable_checkpointing


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes.

    weights: of denoiser and autoencoder. text_encoders: of these. graph: of what the graph of one
    image keeps for its gradient.
    """

    weights: int
    text_encoders: int
    graph: int

    def sentence(self, images: int, freed: bool) -> str:
        """What a run will take, in one line; `freed`: text encoders go once texts are encoded."""
        climbing = self.weights + images * self.graph + (0 if freed else self.text_encoders)
        total = size(max(climbing, self.weights + self.text_encoders))
        encoders = f"text encoders {size(self.text_encoders)}{' (freed once the texts are encoded)' if freed else ''}"
        graph = f", graph {size(self.graph)} a picture x {images}" if self.graph else ""
        parts = f"weights {size(self.weights)}, {encoders}{graph}"
        return f"memory predicted: {parts}: {total} and what the reward takes"


def size(count: int) -> str:
    """Bytes as text."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def predict(settings: DictConfig, gradients: bool, checkpointing: bool) -> Memory:
    """Of a model's config; no weight is read.

    Without `gradients` no graph is kept; `checkpointing` keeps the ends of its parts alone.

    Raises:
        InstantiationException: its config files can be neither found nor downloaded (Hydra wraps
            the line that says so).
    """
    with loading.without_weights():
        model = instantiate(settings, device=None).requires_grad_(False)
    encoders = bytes_of(model.text_encoders)
    weights = bytes_of(model) - encoders
    if not gradients:
        return Memory(weights, encoders, 0)
    predictions = model.steps * (2 if model.guided else 1)
    denoiser, autoencoder = graphs(model)
    if not checkpointing:
        return Memory(weights, encoders, predictions * denoiser + autoencoder)
    enable_checkpointing(model)
    ends, decoder_ends = graphs(model)
    blocks = len(model.blocks()) if model.steps == 1 else 1
    again = max(predictions // model.steps * denoiser // blocks, autoencoder // 4)
    return Memory(weights, encoders, ends * (model.steps == 1) + decoder_ends + again)


def graphs(model: LatentDiffusion) -> tuple[int, int]:
    """Bytes that the graphs of one prediction and of one decoding keep, on shapes alone."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.device("meta"):
        noise, t = torch.empty(1, *model.latent_shape, requires_grad=True), torch.empty(1)
        text = model.encode_prompts([""])
        with counted(weights) as of_denoiser:
            prediction = model.denoise(noise, t, text, empty=False)
        with counted(weights) as of_autoencoder:
            pixels = model.decode_latents(noise - prediction)
    del pixels
    return sum(of_denoiser.values()), sum(of_autoencoder.values())


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@contextmanager
def counted(weights: set[int]) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd keeps for the way back, without the storages of weights."""
    bytes_of_storage: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            bytes_of_storage[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield bytes_of_storage
