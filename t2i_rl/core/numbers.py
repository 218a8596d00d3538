"""Kinds of numbers and words that settings are, and the check of an argument against its kind.

Each kind has its bounds said once. A constructor annotates what it takes, as in `batch_size: Count`
or `max_grad_norm: Positive | None`; the command line checks every class of a config by that
(`t2i_rl.command.settings`), and constructors that are called from Python check themselves
(`check_arguments`). Upper bounds keep out what overflows or means nothing; each says why.
"""

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf

from t2i_rl.core.errors import UserError
from t2i_rl.core.signatures import makers, parameters


@dataclass(frozen=True)
class Number:
    """What a number may be.

    says: completes "must be". whole: no fractions. open_low, open_high: the bound itself is left
    out. also: further numbers that lie outside the bounds.
    """

    says: str
    low: float
    high: float
    whole: bool = False
    open_low: bool = False
    open_high: bool = False
    also: tuple[float, ...] = ()

    def holds(self, value: Any) -> bool:
        if type(value) is not int and (self.whole or type(value) is not float):
            return False  # `true` is no number, though Python counts with it
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return value in self.also or (above and below)

    def asked_of(self, value: Any) -> str:
        """What a value that does not hold ought to be."""
        beyond = type(value) in (int, float) and value > self.high and self.whole and str(self.high) not in self.says
        return f"{self.says}, and at most {self.high}" if beyond else self.says


@dataclass(frozen=True)
class Words:
    """What a text may be: `says` completes "must be", `pattern` is what the whole of it matches."""

    says: str
    pattern: str

    def holds(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def asked_of(self, value: Any) -> str:
        return self.says


MOST = 2**31 - 1  # what indices of 32 bits can count
FAR = 1e6  # a weight so many times another's leaves nothing of it in float32, which has 24 bits

Count = Annotated[int, Number("a whole number of 1 or more", 1, MOST, whole=True)]
Whole = Annotated[int, Number("a whole number of 0 or more", 0, MOST, whole=True)]
GroupSize = Annotated[
    int, Number("a whole number of 2 or more (advantages compare within a group)", 2, MOST, whole=True)
]
Seed = Annotated[int, Number("a whole number from 0 to 2**32 - 1", 0, 2**32 - 1, whole=True)]  # NumPy's generators
Pixels = Annotated[int, Number("a whole number of pixels from 8 to 16384", 8, 16384, whole=True)]
Sign = Annotated[int, Number("-1, 0 or 1", -1, 1, whole=True)]
Direction = Annotated[int, Number("-1 or 1", 1, 1, whole=True, also=(-1,))]

Finite = Annotated[float, Number("a finite number", -1e30, 1e30)]  # squares of more overflow float32's range twice over
Positive = Annotated[float, Number("a number above 0, and at most 1e6", 0, FAR, open_low=True)]
Weight = Annotated[float, Number("a number of 0 or more, and at most 1e6", 0, FAR)]
SignedWeight = Annotated[float, Number("a number from -1e6 to 1e6", -FAR, FAR)]
Share = Annotated[float, Number("a number from 0 to 1", 0, 1)]
Factor = Annotated[float, Number("a number above 0, and at most 1", 0, 1, open_low=True)]
Decay = Annotated[float, Number("a number of at least 0 and below 1", 0, 1, open_high=True)]
Threshold = Annotated[float, Number("a number of at least 0 and below 1, which no score reaches", 0, 1, open_high=True)]
# what no gradient reaches clips nothing, as null does
GradientNorm = Annotated[float, Number("a number above 0, and at most 1e10", 0, 1e10, open_low=True)]
ClipRange = Annotated[
    float, Number("a number above 0 and below 1, as no ratio falls below 0", 0, 1, open_low=True, open_high=True)
]
# Adam moves a weight by its rate: weights of a network are below 10
LearningRate = Annotated[float, Number("a number above 0, and at most 10", 0, 10, open_low=True)]
# noise climbs along gradients that are clipped to 0.01, at rates of 50 and more
ClimbingRate = Annotated[float, Number("a number above 0, and at most 1e4", 0, 1e4, open_low=True)]
LeastRate = Annotated[float, Number("a number of 0 or more, and at most 10", 0, 10)]
# at a rate of 0.1 a decay of 10 takes a weight away in one step
WeightDecay = Annotated[float, Number("a number from 0 to 10", 0, 10)]
# below 0.001 logits overflow, above 100 the draw is uniform but for rounding
Temperature = Annotated[float, Number("0 (greedy), or a number from 0.001 to 100", 1e-3, 100, also=(0,))]
# predictions a hundred times past the prompt's own are none of any picture
Guidance = Annotated[float, Number("a number from 0 to 100", 0, 100)]
Guidances = Annotated[Any, Guidance | list[Guidance]]

Dtype = Annotated[str, Words("one of float32, bfloat16, float16", "float32|bfloat16|float16")]
Device = Annotated[str, Words("auto, cpu, mps or a GPU like cuda:1", r"auto|cpu|mps|cuda(:\d+)?")]
Duration = Annotated[str, Words("a time as days:hours:minutes:seconds, like 00:01:30:00", r"\d+:\d\d:\d\d:\d\d")]


def check_arguments(kind: type, arguments: Mapping[str, Any], where: str) -> None:
    """Whether the arguments for the parameters of `kind` are what these are annotated with.

    Raises:
        UserError: one line that names the setting as `<where>.<name>`, what it must be, and what it
            is.
    """
    for name, hint in parameters_of(kind).items():
        if name in arguments:
            check_value(arguments[name], hint, f"{where}.{name}")


def check_value(value: Any, hint: Any, where: str) -> None:
    """Whether a value is of the kind that a hint names, also within lists and mappings.

    Raises:
        UserError: it is not.
    """
    members = _members(hint)
    demands = [says for member in members if (says := _unlike(value, member)) is not None]
    if len(demands) < len(members):
        return
    for member in members:  # say which item of a list is wrong, not that the list is
        for item, inner_hint, index in _items(value, member):
            check_value(item, inner_hint, f"{where}{index}")
    fix = f" (write {int(value)})" if type(value) is float and value.is_integer() and _wants_whole(members) else ""
    raise UserError(f"{where} must be {', or '.join(dict.fromkeys(demands))}, not {shown(value)}{fix}")


def shown(value: Any) -> str:
    """A value as it is written in a config, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parameters_of(kind: Any) -> dict[str, Any]:
    """The annotations of what a class or a function takes, by name.

    A class takes with its own what it hands on to its bases as `**options`.
    """
    hints: dict[str, Any] = {}
    for maker in makers(kind):
        annotations = _annotations(maker)
        for parameter in parameters(maker):
            variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if parameter.name in annotations and not variable:
                hints.setdefault(parameter.name, annotations[parameter.name])
    return hints


def _annotations(maker: Any) -> dict[str, Any]:
    try:
        return get_type_hints(maker, include_extras=True)
    except (NameError, TypeError):  # names that only a type checker imports: what needs no name is left
        hints = getattr(maker, "__annotations__", {})  # a class written in C has none
        return {name: hint for name, hint in hints.items() if not isinstance(hint, str)}


def _members(hint: Any) -> list[Any]:
    """The parts of a union; a dataclass for Hydra writes one as `Annotated[Any, X | Y]`."""
    if get_origin(hint) is Annotated and get_args(hint)[0] is Any:
        return _members(get_args(hint)[1])
    if get_origin(hint) not in (Union, UnionType):
        return [hint]
    return [part for member in get_args(hint) for part in _members(member)]


def _wants_whole(members: Iterable[Any]) -> bool:
    bounds = [(member, _bounds(member)) for member in members]
    return any(member is int or (isinstance(number, Number) and number.whole) for member, number in bounds)


def _bounds(hint: Any) -> Number | Words | None:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Number | Words)), None)


PLAIN = (bool, int, float, str, list, ListConfig)
SIMPLE = {  # what a plain annotation asks for, and whether a value is that
    NoneType: ("null", lambda value: value is None),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: type(value) is int),
    float: ("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    str: ("text", lambda value: type(value) in (str, int, float) or isinstance(value, Path)),  # 2024 may be a folder
}


def _unlike(value: Any, hint: Any) -> str | None:
    """None where a value is what one hint (no union) asks for; else what that is."""
    bounds, origin = _bounds(hint), get_origin(hint)
    if bounds is not None:
        return None if bounds.holds(value) else bounds.asked_of(value)
    if origin is Annotated:
        return _unlike(value, get_args(hint)[0])
    if hint in SIMPLE:
        says, holds = SIMPLE[hint]
        return None if holds(value) else says
    kind = origin or hint
    if not inspect.isclass(kind) or kind is Any or issubclass(kind, Path):
        return None
    if issubclass(kind, Mapping):
        return None if isinstance(value, Mapping | DictConfig) and _all_like(value, hint) else "a mapping"
    if issubclass(kind, Sequence):
        return None if _is_list(value) and _all_like(value, hint) else _list_says(value, hint)
    return "what a class makes (_target_: ...)" if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    """Whether a value is as a YAML holds it: no object that `_target_` or a dataclass has made."""
    if isinstance(value, dict | DictConfig):
        return "_target_" not in value and OmegaConf.get_type(OmegaConf.create(value)) is dict
    return value is None or isinstance(value, PLAIN)


def _all_like(value: Any, hint: Any) -> bool:
    if _length(hint) not in (None, len(value)):
        return False
    items = _items(value, hint)
    return all(any(_unlike(item, member) is None for member in _members(inner_hint)) for item, inner_hint, _ in items)


def _items(value: Any, hint: Any) -> list[tuple[Any, Any, str]]:
    """The items of a list or mapping, each with the hint that it must fit and how it is indexed."""
    inner_hints, kind = get_args(hint), get_origin(hint)
    if not inspect.isclass(kind) or not inner_hints:
        return []
    if issubclass(kind, Mapping) and isinstance(value, Mapping | DictConfig):
        return [(item, inner_hints[1], f".{name}") for name, item in value.items()]
    if issubclass(kind, Sequence) and _is_list(value):
        hints = inner_hints if _length(hint) is not None else [inner_hints[0]] * len(value)
        return [(item, inner, f"[{number}]") for number, (item, inner) in enumerate(zip(value, hints, strict=False))]
    return []


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | ListConfig) and not isinstance(value, str)


def _length(hint: Any) -> int | None:
    inner_hints = get_args(hint)
    is_fixed = get_origin(hint) is tuple and inner_hints and inner_hints[-1] is not Ellipsis
    return len(inner_hints) if is_fixed else None


def _list_says(value: Any, hint: Any) -> str:
    length = _length(hint)
    example = f", like [{value}]" if isinstance(value, str) and length is None else ""
    return f"a list of {length}" if length is not None else f"a list{example}"
