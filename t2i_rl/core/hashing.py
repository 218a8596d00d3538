"""One hash for the weights of a model, sharded or not."""

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from t2i_rl.core.contracts import Reward


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, without its graph; where FSDP has sharded it, every rank must call this."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def weights_sha256(model: torch.nn.Module, adapters: bool = True, dtype: torch.dtype | None = None) -> str:
    """Hex sha256 of every weight's name and bytes.

    Args:
        adapters: False sees the model under its LoRA adapters.
        dtype: fractions are rounded to it first: float32 weights and the same loaded in bfloat16
            are one model to `torch.bfloat16`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if adapters or "lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            tensor = gathered(tensor).cpu()
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def modules_sha256(reward: Reward) -> dict[str, Any]:
    """Hashes of the networks behind a reward by their names, and of those behind its parts."""
    networks = {name: value for name, value in vars(reward).items() if isinstance(value, torch.nn.Module)}
    hashes: dict[str, Any] = {name: weights_sha256(network) for name, network in networks.items()}
    return hashes | {name: modules_sha256(part) for name, part in reward.parts.items()}
