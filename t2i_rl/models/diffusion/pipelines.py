"""Stock pipelines of diffusers on a disk: their configs, the whole, or shapes without values."""

from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn

from t2i_rl.core import loading
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_weights
from t2i_rl.core.ranks import own_gpu
from t2i_rl.models.diffusion.text_encoders import tokenizers_of

INDEX = "model_index.json"


def read_config(path: str, part: str | None = None, revision: str | None = None, file: str = "config.json") -> dict:
    """A config file of a pipeline's part (None: of the folder itself), whatever class it is for.

    Raises:
        UserError: it can be neither found nor downloaded; the line names what to do.
    """
    kind = type("Config", (ConfigMixin,), {"config_name": file})
    try:
        return kind.load_config(path, subfolder=part, revision=revision)
    except (OSError, ValueError) as error:
        raise loading.cannot_load(path, error) from error


def load_pipeline(
    stock_class: Any,
    path: str,
    dtype: str,
    revision: str | None = None,
    device: str | None = None,
    **parts: Any,
) -> Any:
    """A stock pipeline (or part of one) from a folder or a hub id, frozen and in eval mode.

    Args:
        device: `auto` is this process's GPU; None the CPU.
        parts: in place of the pipeline's own, by name.

    Raises:
        UserError: it can be neither found nor downloaded, is not whole, or holds weights that are
            not finite; the line names what to do.
    """
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for library in (logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if dtype not in loading.DTYPES:
        raise UserError(f"dtype must be one of {', '.join(loading.DTYPES)}, not {dtype!r}")
    try:
        index = stock_class.load_config(path, revision=revision)
        absent = {name: None for name, part in index.items() if part == [None, None]}  # SD3 without T5
        if not issubclass(stock_class, nn.Module):
            parts |= tokenizers_of(path, revision, index)
        if loading.WEIGHTLESS.get():
            if issubclass(stock_class, nn.Module):
                return on_meta(stock_class, index, getattr(torch, dtype))
            parts = shapes_of(path, revision, index, getattr(torch, dtype)) | parts
        pipe = stock_class.from_pretrained(path, revision=revision, dtype=getattr(torch, dtype), **(absent | parts))
    except (OSError, ValueError) as error:
        raise loading.cannot_load(path, error) from error
    if loading.WEIGHTLESS.get():
        return pipe
    pipe = pipe.to(own_gpu() if device == "auto" else device or "cpu")
    modules = {"": pipe} if isinstance(pipe, nn.Module) else pipe.components
    for name, part in modules.items():
        if isinstance(part, nn.Module):
            check_weights(part.named_parameters(prefix=name), path)
    return pipe


def shapes_of(path: str, revision: str | None, index: dict, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules that a pipeline's index names, built from their configs without values."""
    import diffusers
    import transformers

    libraries, modules = {"diffusers": diffusers, "transformers": transformers}, {}
    for name, entry in index.items():
        if not isinstance(entry, (list, tuple)):
            continue  # a setting of the pipeline, and no part of it
        library, class_name = entry
        kind = getattr(libraries.get(library), class_name or "", None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            load_config = kind.load_config if library == "diffusers" else kind.config_class.from_pretrained
            modules[name] = on_meta(kind, load_config(path, subfolder=name, revision=revision), dtype)
    return modules


def on_meta(kind: type[nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    """A module of diffusers or transformers without values."""
    with torch.device("meta"):
        return (kind.from_config(config) if issubclass(kind, ConfigMixin) else kind(config)).to(dtype)
