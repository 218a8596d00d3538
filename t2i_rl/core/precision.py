"""bfloat16 or float32, where nobody says: a processor without instructions for bfloat16 is many times slower in it."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

CPUINFO = Path("/proc/cpuinfo")
FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})  # of x86, then of Arm, as /proc/cpuinfo names them
GROUPS = ("trainer", "model", "reward", "task")


def auto_precision(accelerator: str | None = None) -> str:
    """Lightning's `precision` where none is given. `accelerator` is `gpu` or `cpu`; None: a GPU if there is one."""
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
    """Whether this CPU has. Torch's own answer counts AVX-512 without them as support, so the flags are read; a system
    that shows no flags (macOS, Windows) counts as having none, which costs some speed and no accuracy."""
    if not CPUINFO.is_file():
        return False
    lines = (line.split(":", 1) for line in CPUINFO.read_text(errors="replace").splitlines() if ":" in line)
    return any(name.strip().lower() in ("flags", "features") and FLAGS & set(value.split()) for name, value in lines)


def precision_lines(cfg: DictConfig) -> list[str]:
    """What was chosen for settings that leave it open, and a warning of bfloat16 that is given where it is slow."""
    import torch

    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    has, where = has_bfloat16(cfg.trainer.accelerator), "this GPU" if on_gpu else "this CPU"
    settings = [(key, cfg_value, raw) for key, cfg_value, raw in _settings(cfg) if cfg_value is not None]
    chosen = {f"{key.split('.')[-1]}={value}": None for key, value, raw in settings if "${auto_" in str(raw)}
    given = [f"{key}={value}" for key, value, raw in settings if "${auto_" not in str(raw) and _is_bfloat16(value)]
    lines = []
    if chosen:
        lines.append(f"{', '.join(chosen)} is chosen: {where} {'has' if has else 'has no'} bfloat16 instructions")
    if given and not has:
        lines.append(
            f"{', '.join(given)} is taken as given, but {where} has no bfloat16 instructions: float32 would be many "
            "times "
            "faster"
        )
    return lines


def _is_bfloat16(value) -> bool:
    return str(value).startswith(("bf16", "bfloat16"))


def _settings(cfg: DictConfig) -> Iterator[tuple[str, object, object]]:
    """Every `precision` and `dtype` that this run reads: its name, its value, and what the config says unresolved."""
    for group in GROUPS:
        node = cfg.get(group)
        recipes = node.get("recipes") if group == "task" and node is not None else None
        if recipes is not None:  # task=pretrain: of its recipes this model's alone
            name = Path(str(cfg.model.path)).name
            yield from _below(recipes[name], f"task.recipes.{name}") if name in recipes else ()
        elif node is not None:
            yield from _below(node, group)


def _below(node: DictConfig, where: str) -> Iterator[tuple[str, object, object]]:
    raw = OmegaConf.to_container(node, resolve=False)
    for name in node:
        if isinstance(raw[name], dict):
            yield from _below(node[name], f"{where}.{name}")
        elif name in ("precision", "dtype"):
            yield f"{where}.{name}", node[name], raw[name]
