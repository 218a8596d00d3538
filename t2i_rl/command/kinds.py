"""Whether the settings that no class reads are of the kind that stands for them in conf/: a list where a list belongs,
and not null.

What a class says of its arguments is held against it by `settings`.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from t2i_rl.command.class_attributes import load_yaml
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import check_value, shown
from t2i_rl.core.places import CONF

OF_PARTS = ("callbacks", "logger", "watch")  # each setting of these is a part, or null to leave it out
MAY_BE_NULL = ("optimized_metric", "model.path")  # the latter is refused with the setting that it comes from


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
