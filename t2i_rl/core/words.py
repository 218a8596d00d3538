"""The words that configs may use in `${...}`: `register` makes them known to OmegaConf."""

from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from t2i_rl.core.folders import run_id
from t2i_rl.core.places import PACKAGE
from t2i_rl.core.precision import auto_dtype, auto_precision


def said(key: str, otherwise: Any = None, *, _root_: DictConfig) -> Any:
    """What a part says of itself, as `model.family`: in its config, else in its class; `otherwise` where neither does.

    Configs of classes of the package say all that there is to say: a test holds them to it.
    """
    group, name = key.split(".")
    part = _root_[group]
    if name in part:
        return part[name]
    if str(part.get("_target_", "")).startswith(f"{PACKAGE.name}."):
        return otherwise
    try:
        return getattr(get_class(part._target_), name, None) or otherwise
    except Exception:  # a class that cannot be imported is complained about where classes are checked
        return otherwise


def gpu_or_cpu() -> str:
    """The accelerator that a run takes when none is named."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def smaller(*numbers: float) -> float:
    """The smallest of some numbers."""
    return min(numbers)


def basename(path: object) -> str:
    """The last part of a path."""
    return Path(str(path)).name


def package_dir(name: str) -> str:
    """A folder of the package."""
    return str(PACKAGE / name)


def register() -> None:
    """Make the words known, each by its function's name."""
    for word in (said, gpu_or_cpu, smaller, basename, package_dir, auto_precision, auto_dtype):
        OmegaConf.register_new_resolver(word.__name__, word, replace=True)
    OmegaConf.register_new_resolver("run_id", run_id, replace=True, use_cache=True)  # one for all of a command
