"""Loading transformers' checkpoints, and one clear line for whatever is wrong with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from t2i_rl.core.errors import UserError, first_line
from t2i_rl.core.finite import check_weights
from t2i_rl.core.ranks import own_gpu
from t2i_rl.core.tokenizing import check_tokenizer

WEIGHTLESS: ContextVar[bool] = ContextVar("weightless", default=False)
DTYPES = ("float32", "bfloat16", "float16")


@contextmanager
def without_weights() -> Iterator[None]:
    """Pipelines made in here have shapes and no values (torch's meta device).

    Nothing but config files and tokenizers is read.
    """
    token = WEIGHTLESS.set(True)
    try:
        yield
    finally:
        WEIGHTLESS.reset(token)


def load_config(path: str, kind: str, revision: str | None = None) -> Any:
    """The config of a checkpoint, from a folder or a hub id; no weights are read.

    Args:
        kind: transformers' `model_type`.

    Raises:
        UserError: it can be neither found nor downloaded, or is of another kind; the line names
            what to do.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise cannot_load(path, error) from error
    if config.model_type != kind:
        raise UserError(f"{path} holds a {config.model_type!r} model, not a {kind} one")
    return config


def load_model(
    model_class: Any,
    path: str,
    *,
    kind: str,
    dtype: str,
    revision: str | None = None,
    device: str | None = None,
    **settings: Any,
) -> Any:
    """A model in eval mode, read straight into its dtype on its device.

    Args:
        model_class: of transformers.
        kind: transformers' `model_type`.
        device: `auto` is this process's GPU, if there is one; None the CPU.

    Raises:
        UserError: the checkpoint is missing, gated, of another kind, truncated, not whole or not
            finite; the line names what to do.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    load_config(path, kind, revision)
    try:
        model, info = model_class.from_pretrained(
            path,
            revision=revision,
            dtype=getattr(torch, dtype),
            device_map=own_gpu() if device == "auto" else device,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError) as error:
        raise cannot_load(path, error) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"{path} holds weights of other shapes than its config.json says; fetch it again") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        reason = f"a weight file is truncated or broken ({error}); fetch it again"
        raise UserError(f"cannot load {path}: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path} lacks {len(missing)} weights, first {missing[0]}; the checkpoint is not whole")
    check_weights(model.named_parameters(), path)
    return model.eval()


def load_part(auto_class: Any, path: str, revision: str | None = None, **settings: Any) -> Any:
    """A tokenizer or an image processor, by a class of transformers that has `from_pretrained`.

    Raises:
        UserError: it can be neither found nor downloaded, or is a tokenizer that knows no words;
            the line names what to do.
    """
    try:
        part = auto_class.from_pretrained(path, revision=revision, **settings)
    except Exception as error:  # the tokenizers library raises the bare class for a file that its class cannot read
        raise cannot_load(path, error) from error
    is_tokenizer = hasattr(part, "get_vocab")
    if is_tokenizer and set(part.get_vocab()) <= set(part.all_special_tokens):
        raise UserError(f"cannot load {path}: its tokenizer knows no words; check that tokenizer.json is there")
    return part


def load_tokenizer(
    path: str, revision: str | None = None, *, kind: Any = None, subfolder: str = "", **model: Any
) -> Any:
    """A tokenizer for a text encoder, checked against its model.

    A special token that is spelt in a text is read as text.

    Args:
        kind: its class; None is whichever the checkpoint names.
        model: what `check_tokenizer` takes: `rows`, `begin`, `end`, `needs`.

    Raises:
        UserError: see `load_part` and `check_tokenizer`.
    """
    from transformers import AutoTokenizer

    tokenizer = load_part(kind or AutoTokenizer, path, revision, **({"subfolder": subfolder} if subfolder else {}))
    check_tokenizer(tokenizer, f"{path}/{subfolder}" if subfolder else path, **model)
    return reads_as_text(tokenizer)


def reads_as_text(tokenizer: Any) -> Any:
    """The tokenizer, which from now on reads a special token that is spelt in a text as letters."""
    tokenizer.split_special_tokens = True
    return tokenizer


def cannot_load(path: str, error: Exception) -> UserError:
    """The error of a library in one line, with the fix."""
    if str(path).startswith(("/", ".", "~")) and not Path(path).exists():
        return UserError(f"cannot load {path}: there is no such folder")
    reason = first_line(error)
    if "does not appear to have a file" in reason and not Path(path).is_dir():
        reason = "it is not on this machine, and the hub did not give it"
    if "gated" in str(error).lower() or "401" in str(error):
        fix = "ask for access on its page, then set HF_TOKEN"
    elif Path(path).is_dir():
        fix = "check that the folder is whole"
    else:
        fix = f"download it where there is a network (hf download {path}), or give the path of a folder"
    return UserError(f"cannot load {path}: {reason} -- {fix}")
