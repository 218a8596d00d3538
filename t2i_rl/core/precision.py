"""Whether to compute in bfloat16 or float32 where nobody says: by what the processor is fast in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

CPUINFO = Path("/proc/cpuinfo")
FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})  # of x86, then of Arm, as /proc/cpuinfo names them
GROUPS = ("trainer", "model", "reward", "task")


def auto_precision(accelerator: str | None = None) -> str:
    """Lightning's `precision` where none is given.

    `accelerator` is `gpu` or `cpu`; None: a GPU if there is one.
    """
    return "bf16-mixed" if has_bfloat16(accelerator) else "32-true"


def auto_dtype(accelerator: str | None = None) -> str:
    """A frozen model's `dtype` where none is given."""
    return "bfloat16" if has_bfloat16(accelerator) else "float32"


def has_bfloat16(accelerator: str | None = None) -> bool:
    """Whether what computes has instructions for bfloat16, rather than a way around them."""
    import torch

    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """Whether this CPU has such instructions, by its flags.

    Torch's own answer counts AVX-512 without them as support. A system that shows no flags (macOS,
    Windows) counts as having none, which costs some speed and no accuracy.
    """
    if not CPUINFO.is_file():
        return False
    lines = (line.split(":", 1) for line in CPUINFO.read_text(errors="replace").splitlines() if ":" in line)
    return any(name.strip().lower() in ("flags", "features") and FLAGS & set(value.split()) for name, value in lines)


def precision_lines(cfg: DictConfig) -> list[str]:
    """What was chosen for settings that leave it open; a warning of slow bfloat16."""
    import torch

    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    has, where = has_bfloat16(cfg.trainer.accelerator), "this GPU" if on_gpu else "this CPU"
    settings = [(key, value, "${auto_" in str(raw)) for key, value, raw in _settings(cfg) if value is not None]
    own_choices = dict.fromkeys(f"{key.split('.')[-1]}={value}" for key, value, automatic in settings if automatic)
    users_bfloat16 = [f"{key}={value}" for key, value, automatic in settings if not automatic and _is_bfloat16(value)]
    lines = []
    if own_choices:
        lines.append(f"{', '.join(own_choices)} is chosen: {where} {'has' if has else 'has no'} bfloat16 instructions")
    if users_bfloat16 and not has:
        lines.append(
            f"{', '.join(users_bfloat16)} is taken as given, but {where} has no bfloat16 instructions: float32 would "
            "be many times faster"
        )
    return lines


def _is_bfloat16(value: object) -> bool:
    return str(value).startswith(("bf16", "bfloat16"))


def _settings(cfg: DictConfig) -> Iterator[tuple[str, object, object]]:
    """Each `precision` and `dtype` of this run: its name, its value, and that unresolved."""
    for group in GROUPS:
        node = cfg.get(group)
        recipes = node.get("recipes") if group == "task" and node is not None else None
        if recipes is not None:  # task=pretrain: of its recipes this model's alone
            name = Path(str(cfg.model.path)).name
            yield from _below(recipes[name], f"task.recipes.{name}") if name in recipes else ()
        elif node is not None:
            yield from _below(node, group)


def _below(node: DictConfig, where: str) -> Iterator[tuple[str, object, object]]:
    raw: Any = OmegaConf.to_container(node, resolve=False)
    for name in map(str, node):
        if isinstance(raw[name], dict):
            yield from _below(node[name], f"{where}.{name}")
        elif name in ("precision", "dtype"):
            yield f"{where}.{name}", node[name], raw[name]
