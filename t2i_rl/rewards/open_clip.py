"""open_clip's checkpoints as transformers' CLIPModel: the same weights under other names."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.loading import DTYPES, cannot_load, first_line
from t2i_rl.core.ranks import own_gpu

RENAMED = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)


def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's names and layouts -> transformers'.

    The joint attention projection is split, and projections are transposed.
    """
    converted = {}
    for name, value in state.items():
        if name == "attn_mask":
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            kind = name.rsplit("_", 1)[1]
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                converted[name.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = piece.clone()
        else:
            converted[name] = value.t().contiguous() if name.endswith("_projection.weight") else value
    return converted


def config_of(state: dict[str, torch.Tensor], text_heads: int, vision_heads: int, eos: int) -> Any:
    """The CLIPConfig that `state`, already converted, fits; sizes are read off the weights.

    A text's state is that of its token `eos`.
    """
    from transformers import CLIPConfig

    def tower(part: str, embedding: str) -> tuple[torch.Tensor, int, dict[str, int | str]]:
        """A tower's embedding, how many positions it has, and what is said of both towers."""
        numbers = (re.match(rf"{part}\.encoder\.layers\.(\d+)\.", name) for name in state)
        weight = state[f"{part}.embeddings.{embedding}.weight"]
        alike = {
            "intermediate_size": len(state[f"{part}.encoder.layers.0.mlp.fc1.weight"]),
            "num_hidden_layers": 1 + max(int(number[1]) for number in numbers if number),
            "hidden_act": "gelu",
            "projection_dim": len(state["text_projection.weight"]),
        }
        return weight, len(state[f"{part}.embeddings.position_embedding.weight"]), alike

    words, longest, text = tower("text_model", "token_embedding")
    text |= {"vocab_size": len(words), "hidden_size": words.shape[1], "max_position_embeddings": longest}
    text |= {"num_attention_heads": text_heads, "eos_token_id": eos}
    patches, patch_positions, vision = tower("vision_model", "patch_embedding")
    side = round((patch_positions - 1) ** 0.5) * patches.shape[-1]
    vision |= {"hidden_size": len(patches), "patch_size": patches.shape[-1], "image_size": side}
    vision |= {"num_attention_heads": vision_heads}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"])


def load_open_clip(
    path: str,
    file: str,
    *,
    text_heads: int,
    vision_heads: int,
    eos: int,
    dtype: str,
    device: str | None,
    revision: str | None,
) -> Any:
    """A CLIPModel from an open_clip file (`.pt` or `.safetensors`) in a folder or on the hub.

    Nothing in it is executed.

    Raises:
        UserError: the file is missing, broken, holds more than tensors, or is no CLIP.
    """
    from transformers import CLIPModel

    if dtype not in DTYPES:
        raise UserError(f"reward.dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    state = convert(read_state(path, file, revision))
    try:
        model = CLIPModel(config_of(state, text_heads, vision_heads, eos))
        model.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}/{file} is no CLIP of open_clip's layout: {first_line(error)}") from error
    device = own_gpu() if device == "auto" else device
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()


def read_state(path: str, file: str, revision: str | None) -> dict[str, torch.Tensor]:
    """The state dict of a file, by itself or under `state_dict`.

    Raises:
        UserError: the file is missing, broken, or holds more than tensors.
    """
    from huggingface_hub import hf_hub_download
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    local = Path(path) / file
    try:
        if not local.exists():
            local = Path(hf_hub_download(path, file, revision=revision))
        if local.suffix == ".safetensors":
            state = load_file(local)
        else:
            state = torch.load(local, map_location="cpu", weights_only=True)
    except (OSError, ValueError) as error:
        raise cannot_load(f"{path}/{file}", error) from error
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{local} is truncated or broken ({first_line(error)}); fetch it again") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{local} holds more or less than named tensors")
    return state
