"""One hash for the weights of a model, sharded or not."""

import hashlib

import torch
from torch.distributed.tensor import DTensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP has sharded (every rank must call it); any other as it is, without its graph."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def weights_sha256(model: torch.nn.Module, adapters: bool = True, dtype: torch.dtype | None = None) -> str:
    """Hex sha256 of every weight's name and bytes; `adapters=False` sees the model under its LoRA adapters. With `dtype` fractions are
    rounded to it first: float32 weights and the same loaded in bfloat16 are one model to `dtype=torch.bfloat16`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if adapters or "lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            tensor = gathered(tensor).cpu()
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def modules_sha256(judge) -> dict[str, str]:
    """Hashes of the networks behind a reward, and behind its parts."""
    found = {name: weights_sha256(value) for name, value in vars(judge).items() if isinstance(value, torch.nn.Module)}
    return found | {name: modules_sha256(part) for name, part in getattr(judge, "parts", {}).items()}
