"""Settings where a paper, its code and ours contradict: the tables of conf/method/variant."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF

VARIANTS = ("ours", "paper", "released")


def preset(method: str, variant: str, kind: str) -> dict[str, Any]:
    """A variant's settings of a method (`agsm`, `softrepa`) for a kind of model.

    Raises:
        UserError: no such variant.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
    rows = _table(variant)[method]
    return rows["all"] | rows.get(kind, {})


def settings_of(method: str, variant: str, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset, over which what is given (not None) wins.

    Raises:
        UserError: no such variant.
    """
    return preset(method, variant, kind) | {name: value for name, value in given.items() if value is not None}


@cache
def _table(variant: str) -> dict[str, dict[str, dict[str, Any]]]:
    return OmegaConf.to_container(OmegaConf.load(CONF / "method" / "variant" / f"{variant}.yaml"))
