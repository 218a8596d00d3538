"""One hash for the weights of a model."""

import hashlib

import torch


def weights_sha256(model: torch.nn.Module, adapters: bool = True) -> str:
    """Hex sha256 of every weight's name and bytes; `adapters=False` sees the model under its LoRA adapters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if adapters or "lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
