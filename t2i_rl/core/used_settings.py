"""What a run used, to the last number: its settings, and the defaults of what it called."""

from collections.abc import Iterator
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, OmegaConf

from t2i_rl.core.signatures import makers, parameters
from t2i_rl.core.stated import STATED

PLAIN = (type(None), bool, int, float, str)
TABLES = ("tables", "presets", "usual")  # what settings refer to, and nothing else reads
USED = ("task", "method", "model", "reward", "regularizer", "watch", "data", "benchmark")


def task_name(cfg: DictConfig) -> str:
    """The task of a run: the module whose `run` it is."""
    return cfg.task._target_.split(".")[-2]


def written_out(cfg: DictConfig) -> dict[str, Any]:
    """A run's config with every number in its place, without the tables of conf/ that numbers were taken from."""
    return {name: value for name, value in plain(cfg).items() if name not in TABLES}


def settings_used(cfg: DictConfig) -> dict[str, Any]:
    """The settings of every part of a run, with defaults."""
    return {group: with_defaults(own_settings(cfg, group)) for group in USED if cfg.get(group)}


def own_settings(cfg: DictConfig, group: str) -> dict[str, Any]:
    """The settings of a part, without what its config only repeats of its class."""
    return {name: value for name, value in plain(cfg[group]).items() if name not in STATED.get(group, ())}


def with_defaults(node: Any) -> Any:
    """The settings of a part and of those in it, with what their signatures give."""
    if isinstance(node, list):
        return [with_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    settings = {name: with_defaults(value) for name, value in node.items()}
    return settings | {name: value for name, value in _defaults(node) if name not in settings}


def _defaults(node: dict) -> Iterator[tuple[str, Any]]:
    if not isinstance(node.get("_target_"), str):
        return
    for function in reversed(makers(_locate(node["_target_"]))):  # the nearest comes last and wins
        for parameter in parameters(function):
            default = parameter.default
            if isinstance(default, PLAIN):
                yield parameter.name, default
            elif isinstance(default, (tuple, list)) and all(isinstance(item, PLAIN) for item in default):
                yield parameter.name, list(default)


def recipe_of(cfg: DictConfig, decide_what_learns: tuple[str, ...]) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it: names of configs, and settings.

    Those settings that decide what it holds stand once more by themselves.
    """
    method, model = own_settings(cfg, "method"), own_settings(cfg, "model")
    names = config_names()
    return {
        "method": names.get("method"),
        "settings": with_defaults(method),
        "decides": {name: method[name] for name in decide_what_learns if name in method},
        "model": {
            "name": names.get("model"),
            "class": model["_target_"],
            **{name: model.get(name) for name in ("path", "revision", "dtype")},
        },
    }


def config_names() -> dict[str, str]:
    """The configs that a run chose, by group; none outside of a run."""
    from hydra.core.hydra_config import HydraConfig

    return dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}


def plain(value: Any) -> Any:
    """The value in Python's own dicts and lists, as JSON and a checkpoint take it."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
