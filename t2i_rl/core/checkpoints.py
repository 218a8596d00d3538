"""Checkpoints as files: written whole or not at all, and anything else refused in one line."""

import os
from pathlib import Path
from typing import Any

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import replacing

SAFETENSORS = "it is a safetensors file; weights are given as model.path, soft tokens as model.soft_tokens"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint beside `path`, then put it in its place.

    What was `last.ckpt` before is `previous.ckpt` from then on.

    Raises:
        UserError: the disk is full or cannot be written to; `path` is then what it was before.
    """
    import torch  # here, as below: a command that is refused does without

    path = Path(path)
    try:
        _clear_remains(path)
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # a full network disk says so here, before the old file changes its name
            if path.name == LAST and path.is_file():
                _keep(path, path.with_name(PREVIOUS))
    except (OSError, RuntimeError) as error:
        failure = _of_the_disk(error)
        if failure is None:
            raise
        way_on = "; the one before is still whole: make room, then go on from it (ckpt_path=last)" * path.is_file()
        reason = failure.strerror or failure
        raise UserError(f"the checkpoint {path} cannot be written: {reason}{way_on}") from error


def _of_the_disk(error: BaseException | None) -> OSError | None:
    """The disk's own error: torch.save raises another, of its failure to close the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _clear_remains(path: Path) -> None:
    """Delete what a process that was killed has left: gigabytes under a name that nobody reads.

    A run folder has one writer, so that nobody is writing them now.
    """
    for remains in path.parent.glob(f".{path.name}.*.tmp"):
        remains.unlink(missing_ok=True)


def _keep(path: Path, under: Path) -> None:
    """Another name for the file, which the next `os.replace` does not touch."""
    under.unlink(missing_ok=True)
    try:
        os.link(path, under)
    except OSError:  # no hard links here: for a moment there is the other name alone, which resuming looks for
        os.replace(path, under)


def read_checkpoint(path: str | Path, setting: str = "ckpt_path", mmap: bool = True) -> dict[str, Any]:
    """What torch.save wrote of a training run.

    Args:
        setting: what the command line calls it.
        mmap: tensors stay on the disk until they are read, so that a look costs nothing.

    Raises:
        UserError: there is no such file, or it is anything else: a folder, empty, cut short,
            another program's, no training run.
    """
    import torch

    path, where = Path(path), f"{setting}={path}"
    if path.is_dir():
        raise UserError(f"{where} is a folder: name a file in it, as {path / 'checkpoints' / LAST}")
    if not path.exists():
        raise UserError(f"{where}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # a foreign file fails in torch's reader with whatever its bytes happen to mean
        raise UserError(f"{where} is no checkpoint of a training run: {_what_is_wrong(path)}") from error
    if not isinstance(checkpoint, dict) or not _is_of_a_run(checkpoint):
        reason = SAFETENSORS if _is_safetensors(path) else "it was written by another program, or holds weights alone"
        raise UserError(f"{where} is no checkpoint of a training run: {reason}")
    return checkpoint


def _is_of_a_run(checkpoint: dict) -> bool:
    import torch

    state = checkpoint.get("state_dict")
    has_weights = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    return has_weights and isinstance(checkpoint.get("global_step"), int)


def _what_is_wrong(path: Path) -> str:
    if not os.access(path, os.R_OK):
        return "it may not be read"
    head = _head(path)
    if not head:
        return "the file is empty"
    if head.startswith(b"PK"):
        return "it is cut short or damaged, or holds more than numbers and tensors, which is not loaded"
    return SAFETENSORS if _is_safetensors(path) else "its bytes are not those of torch.save, or it is cut short"


def _is_safetensors(path: Path) -> bool:
    """That format begins with its header's length, and the header with a brace."""
    head = _head(path)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def newest_whole(folder: str | Path) -> Path:
    """`last.ckpt` of a folder; where that is missing or broken, `previous.ckpt` with a line on it.

    Raises:
        UserError: neither is whole.
    """
    last, previous = Path(folder) / LAST, Path(folder) / PREVIOUS
    try:
        read_checkpoint(last)
        return last
    except UserError as error:
        if not previous.is_file():
            raise
        read_checkpoint(previous)
        print(f"{str(error).removeprefix('ckpt_path=')}; going on from {previous}, saved before it", flush=True)
        return previous
