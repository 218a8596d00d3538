"""Whether every setting is of the kind that its reader takes: a number within bounds, a list for a list.

A number has bounds, and a list stands where a list belongs. What a class says of its arguments is held against it
(`check_settings`); settings that no class reads are compared with what conf/ has in their place (`check_kinds`). Only
the first imports classes.
"""

import inspect
import math
import re
import traceback
from pathlib import Path
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from t2i_rl.core.choices import load_yaml
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import (
    ClimbingRate,
    Count,
    Decay,
    Duration,
    Factor,
    Guidance,
    LearningRate,
    LeastRate,
    Pixels,
    Positive,
    Seed,
    Share,
    Weight,
    WeightDecay,
    Whole,
    check_value,
    parameters_of,
    shown,
)
from t2i_rl.core.places import CONF
from t2i_rl.core.ranks import listed_gpus

OF_PARTS = ("callbacks", "logger", "watch")  # each setting of these is a part, or null to leave it out
MAY_BE_NULL = ("optimized_metric", "model.path")  # the latter is refused with the setting that it comes from
ROOT = {
    **{"seed": Seed, "num_images": Count, "evaluation.batch_size": Count, "evaluation.seed": Seed},
    **dict.fromkeys(("task_name", "variant"), str),
    **dict.fromkeys(("path", "prompt", "prompts_file", "ckpt_path", "image", "latents"), str | None),
}
TORCH = {  # arguments of torch's optimizers and schedulers, which torch itself takes as they come
    "lr": ClimbingRate,  # what trains weights is held to a learning rate by `methods.trainable.check_optimizer`
    "max_lr": ClimbingRate,
    "base_lr": ClimbingRate,
    "min_lr": LeastRate,
    "eta_min": LeastRate,
    "betas": tuple[Decay, Decay],
    "alpha": Decay,
    "momentum": Decay,
    "dampening": Share,
    "eps": Factor | tuple[Factor | None, Factor],  # Adafactor has two
    "weight_decay": WeightDecay,
    "start_factor": Factor,
    "end_factor": Share,
    "factor": Share,
    "gamma": Factor,
    "power": Positive,
    "pct_start": Share,
    "div_factor": Positive,
    "final_div_factor": Positive,
    "total_iters": Count,
    "total_steps": Count,
    "step_size": Count,
    "milestones": list[Count],
    "T_0": Count,
    "T_mult": Count,
    "T_max": Count,
    "patience": Whole,
    "cooldown": Whole,
    "max_iter": Count,
    "max_eval": Count | None,
    "history_size": Count,
    **dict.fromkeys(("nesterov", "amsgrad", "maximize"), bool),
}
TRAINER = {  # of lightning.Trainer; `max_steps` and `devices` have rules of their own
    "num_nodes": Count,
    "log_every_n_steps": Count,
    "max_epochs": Count | None,
    "min_steps": Count | None,
    "min_epochs": Count | None,
    "num_sanity_val_steps": Whole,
    "accumulate_grad_batches": Count,
    "max_time": Duration | dict[str, Whole] | None,
    **dict.fromkeys(("use_distributed_sampler", "enable_model_summary", "enable_progress_bar"), bool | None),
    **dict.fromkeys(("detect_anomaly", "barebones", "sync_batchnorm"), bool),
    **{f"limit_{part}_batches": Count | Factor | None for part in ("train", "val", "test", "predict")},
}
LORA = {"r": Count, "lora_alpha": Positive, "lora_dropout": Decay}
TASK = {  # leaves below `task`, by name: one word means one thing in all tasks
    **dict.fromkeys(
        ("cases", "steps", "average", "batch_size", "rows_per_shard", "parts", "count", "shard_size"), Count
    ),
    **dict.fromkeys(("prompts_per_task", "samples", "width", "layers", "single_layers", "codes", "batches"), Count),
    **dict.fromkeys(("start", "part", "warmup", "alone"), Whole),
    **dict.fromkeys(("source_guidance", "target_guidance", "guidance"), Guidance),
    **dict.fromkeys(("right_share", "ascii_share", "slip_share", "zeros_share"), Share),
    **dict.fromkeys(("lr", "muon_lr"), LearningRate),
    **dict.fromkeys(("kl_weight", "regression"), Weight),
    **dict.fromkeys(("texts", "adapter"), bool),
    "packed": bool | None,
    "image_size": Pixels,
    "channels": Count | list[Count],
    "shift": Positive,
    "words": tuple[Count, Count],
    "counts": dict[str, Whole],
    "sizes": dict[str, Count],
}


def check_kinds(cfg: DictConfig, task: str | None) -> None:
    """Refuse what no reader of a setting could take.

    Args:
        task: the name of the config in conf/task.

    Raises:
        UserError: one line that names the setting and the kind that it must be of.
    """
    defaults = load_yaml(CONF / "config.yaml")
    del defaults["defaults"], defaults["hydra"]
    defaults["evaluation"]["seed"] = defaults["seed"]  # which it refers to
    for key in [*defaults, "trainer", "paths", "regularizer", "logger", "callbacks"]:
        if key not in cfg:
            fix = f"take {key}=none" if (CONF / key / "none.yaml").is_file() else f"leave ~{key} out"
            raise UserError(f"a run has to have {key}: {fix}")
    for group in OF_PARTS:
        _check_parts(cfg[group], group)
    if isinstance(cfg.evaluation, DictConfig) and cfg.evaluation.stages is not None:
        check_value(cfg.evaluation.stages, list, "evaluation.stages")
    _check_against(cfg, defaults, "")
    for group, name in (("task", task), ("paths", "default")):
        file = CONF / group / f"{name}.yaml"
        if file.is_file() and isinstance(cfg.get(group), DictConfig):
            _check_against(cfg[group], load_yaml(file), f"{group}.")


def _check_parts(node: Any, group: str) -> None:
    if not isinstance(node, DictConfig):
        raise UserError(f"{group} must hold parts by name, not {shown(node)}; ~{group}.<name> takes one out")
    for name, part in node.items():
        if part is not None and not isinstance(part, DictConfig):
            raise UserError(f"{group}.{name} must be settings with a _target_, or null, not {shown(part)}")
        if part is not None and group == "watch" and "_target_" not in part:  # of the others, presets set parts
            raise UserError(f"watch.{name} names no class (_target_): take +reward@watch.{name}=<name>")


def _check_against(node: DictConfig, defaults: dict, where: str) -> None:
    """Compare settings that no class reads with what conf/ has in their place."""
    for name, default in defaults.items():
        if name not in node or OmegaConf.is_missing(node, name) or default in (None, "???") or name in MAY_BE_NULL:
            continue
        value, referring = node[name], isinstance(default, str) and "${" in default
        if isinstance(default, dict) and where + name not in OF_PARTS:
            check_value(value, dict, where + name)
            _check_against(value, default, f"{where}{name}.")
        elif referring and value is None:
            raise UserError(f"{where}{name} must be given, not null")
        elif not isinstance(default, dict) and not referring:
            check_value(value, type(default), where + name)


def check_root(cfg: DictConfig) -> None:
    """Whether the numbers of the root are what they have to be.

    Raises:
        UserError: see `check_settings`.
    """
    for key, kind in ROOT.items():
        check_value(OmegaConf.select(cfg, key), kind, key)


def check_settings(cfg: DictConfig, groups: list[str]) -> None:
    """Whether every setting of these groups is of the kind that it has to be.

    Raises:
        UserError: one line that names the setting, what it must be, and what it is.
    """
    for group in groups:
        if OmegaConf.is_dict(cfg[group]):
            _check_node(cfg[group], group)


def _check_node(node: DictConfig, where: str) -> None:
    kinds = _kinds(node, where)
    for name in node:
        if OmegaConf.is_missing(node, name):
            continue
        value, key = node[name], f"{where}.{name}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, not {value}")
        if name in kinds and "_target_" not in _keys(value):
            check_value(value, kinds[name], key)
        if OmegaConf.is_dict(value) and not (kinds is TASK and name in TASK):  # whose names are the user's own
            _check_node(value, key)


def _keys(value: Any) -> list:
    return list(value) if OmegaConf.is_dict(value) else []


def _kinds(node: DictConfig, where: str) -> dict[str, Any]:
    """What the settings of a node must be, by name: as its class says, or as the tables above do where it is of no
    class."""
    target = node.get("_target_")
    if where.partition(".")[0] == "task" and (target is None or where == "task"):
        return TASK
    if target is None:
        return LORA if where.endswith(".lora") else {}
    if where == "trainer":
        _check_length_and_devices(node)
        return TRAINER
    kind = class_at(target, where)
    if (getattr(inspect.getmodule(kind), "__name__", "")).partition(".")[0] == "torch":
        return TORCH
    return parameters_of(kind)


def class_at(target: str, key: str, shipped: str = "") -> Any:
    """What the `_target_` at `key` names.

    Args:
        shipped: what to say where there is no such class.

    Raises:
        UserError: there is no such class, or its module cannot be imported, with the line that fails.
    """
    try:
        return _locate(target)
    except ImportError as error:
        cause = error.__cause__ or error
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and f"{target}.".startswith(f"{missing}."):
            looked = f" (no {missing}.py beside run.py or on PYTHONPATH)" if "." not in missing else ""
            raise UserError(f"{key}._target_={target}: there is no such class{looked}{shipped}") from None
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        at = "" if isinstance(cause, SyntaxError) else f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise UserError(
            f"{key}._target_={target}: its module cannot be imported: {type(cause).__name__}: {cause}{at}"
        ) from None


def _check_length_and_devices(trainer: DictConfig) -> None:
    steps = trainer.get("max_steps")
    if not (steps == -1 and type(steps) is int and (trainer.get("max_time") or trainer.get("max_epochs"))):
        check_value(steps, Count, "trainer.max_steps")  # else -1, without an end, under another limit
    devices = trainer.get("devices")
    if isinstance(devices, str) and re.fullmatch(r"-1|[1-9]\d*|\d+(,\d+)*,?", devices):  # Lightning's own forms
        devices = ListConfig(listed_gpus(devices)) if "," in devices else int(devices)
    if devices == "auto" or (type(devices) is int and (devices == -1 or devices > 0)):
        return
    listed = list(devices) if OmegaConf.is_list(devices) else []
    if listed and all(type(device) is int and device >= 0 for device in listed) and len(set(listed)) == len(listed):
        return
    raise UserError(
        "trainer.devices must be a number of devices, -1 for all, or a list of different ones, like [0, 1], not "
        f"{shown(devices)}"
    )
