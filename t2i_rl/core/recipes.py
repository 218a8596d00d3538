"""What a run used, to the last number: the composed settings, and those that only the signature of a class or function
gives."""

from collections.abc import Iterator
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, OmegaConf

from t2i_rl.core.signatures import makers, parameters

PLAIN = (type(None), bool, int, float, str)
USED = ("task", "method", "model", "reward", "regularizer", "watch", "data", "benchmark")


def settings_used(cfg: DictConfig) -> dict[str, Any]:
    """The settings of every part of a run, with defaults."""
    return {group: with_defaults(plain(cfg[group])) for group in USED if cfg.get(group)}


def with_defaults(node: Any) -> Any:
    """A part's settings, and those of the parts in it: what is not given is what its class or function takes then."""
    if isinstance(node, list):
        return [with_defaults(item) for item in node]
    if not isinstance(node, dict):
        return node
    given = {name: with_defaults(value) for name, value in node.items()}
    return given | {name: value for name, value in _defaults(node) if name not in given}


def _defaults(node: dict) -> Iterator[tuple[str, Any]]:
    if not isinstance(node.get("_target_"), str):
        return
    for function in reversed(makers(_locate(node["_target_"]))):  # the nearest comes last and wins
        for parameter in parameters(function):
            if isinstance(parameter.default, PLAIN):
                yield parameter.name, parameter.default
            elif isinstance(parameter.default, (tuple, list)) and all(
                isinstance(item, PLAIN) for item in parameter.default
            ):
                yield parameter.name, list(parameter.default)


def recipe_of(cfg: DictConfig, decide_what_learns: tuple[str, ...]) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it: names of configs, settings, and those settings that decide what
    it holds."""
    method, model = plain(cfg.method), plain(cfg.model)
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
