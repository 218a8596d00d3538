"""Trouble of the machine in one line: no memory, a full disk, a folder that cannot be written, a port that is taken."""

import errno
import os
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from t2i_rl.command.rank_watch import RankWatch
from t2i_rl.core.errors import UserError, first_line
from t2i_rl.core.ranks import global_rank
from t2i_rl.core.used_settings import task_name

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
OTHER = (errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG, errno.ESTALE)
KNOBS = {  # settings that take less memory when they are smaller (or true), by task
    "train": (
        *("method.micro_batch_size", "method.pairs_per_pass", "method.tokens_per_pass"),
        *("method.gradient_checkpointing=true", "method.offload_reference=true"),
        *("model.rollout.max_rows", "model.rollout.keep=false", "data.batch_size", "evaluation.batch_size"),
    ),
    "optimize_noise": ("method.batch_size", "method.gradient_checkpointing=true", "method.free_text_encoders=true"),
    "encode": ("task.batch_size",),
    "make_irgl": ("evaluation.batch_size", "task.teacher.writer.batch_size", "model.rollout.max_rows"),
    "make_recognizer": ("task.batch_size",),
    "pretrain": ("task.recipes", "evaluation.batch_size"),
}
DRAWING = ("evaluation.batch_size", "model.rollout.max_rows", "model.rollout.keep=false")
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|CUDA out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
CUT_SHORT = re.compile(r"No space left on device|Disk quota exceeded|requested and \d+ written|file write failed")
LOST_PEER = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Connection refused|Timed out waiting|failed to recv"
)
TAKEN_PORT = re.compile(r"EADDRINUSE|[Aa]ddress already in use")


def as_one_line(error: Exception, cfg: DictConfig, out: Path, ranks: RankWatch) -> str | None:
    """What is wrong and the fix, where the machine or another rank is at fault; None for every other error."""
    if isinstance(error, UserError):
        return None
    return _memory(error, cfg) or folder_trouble(error, out) or _port(error) or _slurm(error) or _peer(error, ranks)


def _peer(error: Exception, ranks: RankWatch) -> str | None:
    """Another rank's end, which the network saw first: its connection is closed."""
    if not isinstance(error, RuntimeError) or not LOST_PEER.search(str(error)) or not ranks.has_peers():
        return None
    return ranks.reason() or f"rank {global_rank()} lost the other ranks, see their errors ({first_line(error)})"


def _slurm(error: Exception) -> str | None:
    """Lightning's own advice on how srun was called."""
    return first_line(error) if isinstance(error, RuntimeError | ValueError) and "SLURM" in str(error) else None


def folder_trouble(error: BaseException, out: Path) -> str | None:
    """What is wrong with a folder that was written to, and where to write instead; None for other errors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    code = cause.errno if cause is not None else None
    named = cause.filename if cause is not None and isinstance(cause.filename, str | os.PathLike) else None
    if code in FULL or CUT_SHORT.search(str(error)):
        return (
            f"the disk of {_folder_of(named, out)} is full (or your quota is): free space, or write elsewhere with "
            "paths.root_dir=<folder>; what was saved before is whole, and ckpt_path=last goes on from it"
        )
    if code in CLOSED + OTHER and named is not None and _is_output(named, out):
        return (
            f"{_folder_of(named, out)} cannot be written ({cause.strerror}): take the right to, or write elsewhere "
            "with paths.root_dir=<folder>, or hydra.run.dir=<folder>"
        )
    return None


def _folder_of(named: str | os.PathLike | None, out: Path) -> Path:
    if named is None:
        return out
    path = Path(os.fspath(named))
    return path if path.is_dir() else path.parent


def _is_output(named: str | os.PathLike, out: Path) -> bool:
    """Whether a path lies in the run's folder, or is a folder on the way to it."""
    path, out = Path(os.fspath(named)).absolute(), out.absolute()
    return path.is_relative_to(out) or out.is_relative_to(path)


def _memory(error: Exception, cfg: DictConfig) -> str | None:
    gpu_is_full = type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be imported to know its name
    if not (gpu_is_full or isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
        return None
    on_gpu = gpu_is_full or "CUDA" in str(error) or "CUBLAS" in str(error)
    settings = ", ".join(memory_knobs(cfg))
    return f"out of memory on the {'GPU' if on_gpu else 'CPU'}: take less at a time with {settings}"


def memory_knobs(cfg: DictConfig) -> list[str]:
    """The settings of this task that cost memory, with what they are now, or with what they should be."""
    named = []
    for knob in KNOBS.get(task_name(cfg), DRAWING):
        key, _, wanted = knob.partition("=")
        now = OmegaConf.select(cfg, key, default="absent")
        if now == "absent" or str(now).lower() == wanted:
            continue
        named.append(knob if wanted else key if OmegaConf.is_config(now) else f"{key} (now {now})")
    return named


def _port(error: Exception) -> str | None:
    if not TAKEN_PORT.search(str(error)):
        return None
    port = os.environ.get("MASTER_PORT", "?")
    return f"port {port} (MASTER_PORT) is taken by another process: give another, or unset it and a free one is chosen"
