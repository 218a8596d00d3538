"""What a reward and a benchmark of a user's own must give, asked once before any weight loads."""

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from t2i_rl.core.contracts import Benchmark, Column, Defect, Drawn, Reward, RewardOutput, Verdict
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, check_value, shown
from t2i_rl.core.prompts import Prompt

DISTRIBUTIONS = ("conditional", "guided")
# Names of metrics that are measured with every benchmark, or by methods, so that none of its columns can have them.
MEASURED = ("overall", "lenient", "score", "seen", "held_out", "plan_length", "diversity", "vendi", "fid", "target")
MEASURED_WITHIN = ("task/", "watch/", "health/", "inside/")
LOGGED = ("total", "group_std", "zero_std_ratio", "plan_length_correlation")  # as `reward/<name>`, beside the parts


def check_reward(reward: Any, where: str) -> None:
    """Whether a reward keeps its contract, see `contracts.Reward`.

    Raises:
        UserError: one line that names its class and what it must give.
    """
    name = f"{where} ({type(reward).__name__})"
    _derives(reward, Reward, name)
    _gives(reward, Reward, "__call__", 1, f"{name} must have __call__(drawn)")
    if not (isinstance(reward.reads, type) and issubclass(reward.reads, Drawn)):
        raise UserError(f"{name} must say reads = Drawn, or a class derived from it{_given(reward.reads)}")
    switches = {"needs_images": reward.needs_images, "needs_plans": reward.needs_plans}
    for switch, value in {**switches, "differentiable": reward.differentiable}.items():
        if not isinstance(value, bool):
            raise UserError(f"{name} must say {switch} = True or False{_given(value)}")
    if reward.distribution not in (None, *DISTRIBUTIONS):
        choices = " or ".join(map(repr, DISTRIBUTIONS))
        raise UserError(f"{name} must say distribution = None, or {choices}{_given(reward.distribution)}")
    _sizes(reward.image_sizes, name)
    _names(reward.needs_meta, "needs_meta", name)
    if reward.differentiable:
        lacks = f"{name} is differentiable, and must have score_pixels(pixels, prompts)"
        _gives(reward, Reward, "score_pixels", 2, lacks)
    _takes(reward.refuses, 1, f"{name}.refuses must be callable as refuses(prompt)")


def reward_classes(node: DictConfig | None) -> list[type[Reward]]:
    """The classes of the parts of a reward's config, or its own; none where there is no config.

    Raises:
        UserError: one is no reward.
    """
    parts = (node.get("parts") or {"": node}).values() if node else ()
    kinds = [get_class(part._target_) for part in parts if part]
    for kind in kinds:
        if not issubclass(kind, Reward):
            raise UserError(f"{kind.__name__} must derive from t2i_rl.Reward, whose defaults say what it need not")
    return kinds


def check_benchmark(benchmark: Any, where: str = "benchmark") -> None:
    """Whether a benchmark keeps its contract, see `contracts.Benchmark`.

    Raises:
        UserError: one line that names its class and what it must give.
    """
    name = f"{where} ({type(benchmark).__name__})"
    _derives(benchmark, Benchmark, name)
    _gives(benchmark, Benchmark, "prompts", 0, f"{name} must have prompts()")
    _gives(benchmark, Benchmark, "judge", 2, f"{name} must have judge(images, prompts)")
    _takes(benchmark.features, 1, f"{name} must have features(images)")
    _takes(benchmark.measured, 2, f"{name} must have measured(prompt, verdict)")
    _takes(benchmark.fingerprint, 0, f"{name} must have fingerprint()")
    if not (isinstance(benchmark.name, str) and benchmark.name):
        raise UserError(f'{name} must have a name, like name = "my_benchmark"')
    check_value(benchmark.samples_per_prompt, Count, f"{name}.samples_per_prompt")
    tags = {prompt.tag for prompt in check_prompts(benchmark.prompts(), f"{name}.prompts()")}
    tasks = _names(benchmark.overall_tasks, "overall_tasks", name)
    if not tasks or not set(tasks) <= tags:
        raise UserError(
            f"{name} must say overall_tasks, the tags of its prompts that its overall is the mean of: of "
            f"{sorted(tags)}, not {shown(tasks)}"
        )
    _columns(benchmark.columns, name)
    if benchmark.needs_meta is not None:
        _names(benchmark.needs_meta, "needs_meta", name)
    _sizes(benchmark.image_sizes, name)
    try:
        json.dumps(_mapping(benchmark.fingerprint()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}.fingerprint() must be a dict of plain values, as JSON has them: {error}") from error


def check_prompts(prompts: Any, name: str) -> Sequence[Prompt]:
    """The prompts, if they are some, each a `Prompt`.

    Raises:
        UserError: they are not.
    """
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise UserError(f"{name} must be a list of one Prompt or more, not {_kind_of(prompts)}")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise UserError(f"{name}[{number}] must be a t2i_rl.Prompt, not {_kind_of(prompt)}")
    return prompts


def verdicts_of(benchmark: Any, images: np.ndarray, prompts: list[Prompt]) -> list:
    """A benchmark's verdict on each picture.

    Raises:
        UserError: they are not, in one line that names the class and what its judge must give.
    """
    name, rows, verdicts = f"{type(benchmark).__name__}.judge", len(images), benchmark.judge(images, prompts)
    if not isinstance(verdicts, Sequence) or len(verdicts) != rows:
        count = f"{len(verdicts)} of them" if isinstance(verdicts, Sequence) else _kind_of(verdicts)
        raise UserError(f"{name} must give a list of {rows} verdicts, one a picture, not {count}")
    for verdict in verdicts:
        if not isinstance(verdict, Verdict):
            raise UserError(f"{name} must give verdicts, each a t2i_rl.Verdict, not {_kind_of(verdict)}")
        if not (isinstance(verdict.strict, bool) and isinstance(verdict.lenient, bool)):
            raise UserError(
                f"{name} must give strict and lenient as True or False, not {shown(verdict.strict)} and "
                f"{shown(verdict.lenient)}"
            )
        if not (isinstance(verdict.score, int | float) and 0 <= verdict.score <= 1):
            raise UserError(f"{name} must give a score from 0 to 1, not {shown(verdict.score)}")
        if not (isinstance(verdict.defects, list) and all(isinstance(part, Defect) for part in verdict.defects)):
            raise UserError(f"{name} must give defects as a list of t2i_rl.Defect, not {shown(verdict.defects)}")
    return list(verdicts)


def measured_of(benchmark: Benchmark, prompt: Prompt, verdict: Verdict) -> dict[str, float]:
    """A picture's values in a benchmark's columns, those that are measured on its prompt.

    Raises:
        UserError: they are not numbers by the names of its columns, in one line that names the class.
    """
    name, values = f"{type(benchmark).__name__}.measured", benchmark.measured(prompt, verdict)
    columns = {column.name: column for column in benchmark.columns}
    if not isinstance(values, Mapping) or not set(values) <= set(columns):
        raise UserError(f"{name} must give a dict by the names of its columns ({', '.join(columns)}){_given(values)}")
    for key, value in values.items():
        if not (isinstance(value, int | float) and np.isfinite(value)):
            raise UserError(f"{name} must give finite numbers: {key} is {shown(value)}")
    return {key: float(value) for key, value in values.items() if prompt.tag in (columns[key].tasks or (prompt.tag,))}


def features_of(benchmark: Any, images: np.ndarray) -> np.ndarray | None:
    """A benchmark's features `(N, D)` of pictures; None where it has none.

    Raises:
        UserError: they are neither, in one line that names the class and what its features must be.
    """
    name, rows, features = f"{type(benchmark).__name__}.features", len(images), benchmark.features(images)
    if features is None:
        return None
    if not isinstance(features, np.ndarray) or features.ndim != 2 or len(features) != rows:
        shape = f"one of shape {features.shape}" if isinstance(features, np.ndarray) else _kind_of(features)
        raise UserError(f"{name} must give an array of {rows} rows, one a picture, not {shape}")
    if not np.issubdtype(features.dtype, np.number) or not np.isfinite(features).all():
        raise UserError(f"{name} must give finite numbers")
    return features


def _derives(part: Any, base: type, name: str) -> None:
    if not isinstance(part, base):
        raise UserError(f"{name} must derive from t2i_rl.{base.__name__}, whose defaults say what it need not")


def _gives(part: Any, base: type, method: str, count: int, otherwise: str) -> None:
    """Whether a class has a method of its own where the base has none to give."""
    if getattr(type(part), method) is getattr(base, method):
        raise UserError(otherwise)
    _takes(getattr(part, method), count, otherwise)


def _takes(method: Any, count: int, otherwise: str) -> None:
    """Whether it can be called with so many arguments."""
    if not callable(method):
        raise UserError(otherwise)
    try:
        inspect.signature(method).bind(*[None] * count)
    except TypeError as error:
        raise UserError(f"{otherwise} ({error})") from error
    except ValueError:  # written in C, and without a signature
        return


def _sizes(sizes: Any, name: str) -> None:
    numbers = isinstance(sizes, Collection) and not isinstance(sizes, str)
    if not numbers or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{name} must say image_sizes as whole numbers of pixels, like (32,), not {shown(sizes)}")


def _names(names: Any, attribute: str, name: str) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(key, str) for key in names):
        raise UserError(f'{name} must say {attribute} as several names, like ("color",), not {shown(names)}')
    return tuple(names)


def _columns(columns: Any, name: str) -> None:
    """Whether each column has a name of its own."""
    if not isinstance(columns, Collection) or not all(isinstance(column, Column) for column in columns):
        example = '(Column("blurred", "blurred images"),)'
        raise UserError(f"{name} must say columns as several t2i_rl.Column, like {example}, not {shown(columns)}")
    names = [column.name for column in columns]
    for column in columns:
        taken = column.name in MEASURED or column.name.startswith(MEASURED_WITHIN) or names.count(column.name) > 1
        if not column.name or taken:
            raise UserError(f"{name}: a column needs a name that nothing else has, and {column.name!r} is none")
        _names(column.tasks, f"the tasks of its column {column.name}", name)


def _mapping(value: Any) -> Mapping:
    if not isinstance(value, Mapping):
        raise TypeError(f"it is {_kind_of(value)}")
    return value


def _given(value: Any) -> str:
    return f", not {shown(value)}"


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def checked(output: RewardOutput, rows: int, name: str) -> RewardOutput:
    """The output without gradients, if it is one finite number a row.

    Raises:
        UserError: another type, a wrong shape, or a value that is not finite: a reward that failed never becomes a
            number.
    """
    if not isinstance(output, RewardOutput):
        raise UserError(f"reward {name} must return a RewardOutput(total, parts), not a {type(output).__name__}")
    if not isinstance(output.parts, Mapping) or not all(isinstance(part, str) for part in output.parts):
        raise UserError(f"reward {name}: parts must be tensors by name, not a {type(output.parts).__name__}")
    taken = next((part for part in output.parts if part in LOGGED), None)
    if taken:
        raise UserError(f"reward {name}: a part cannot be called {taken!r}, which is logged as reward/{taken} already")
    for key, value in [("total", output.total), *output.parts.items()]:
        _check_numbers(value, rows, f"reward {name}: {key}")
    return RewardOutput(output.total.detach(), {part: value.detach() for part, value in output.parts.items()})


def _check_numbers(value: torch.Tensor, rows: int, what: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{what} must be a tensor of {rows} numbers, one a row, not a {type(value).__name__}")
    if value.is_complex():
        raise UserError(f"{what} must be real numbers, not {str(value.dtype).removeprefix('torch.')}")
    if value.shape != (rows,):
        raise UserError(f"{what} has shape {tuple(value.shape)}, expected ({rows},): one number a row")
    bad = ~(value.double().abs() <= torch.finfo(torch.float32).max)  # advantages are float32
    if bad.any():
        raise UserError(
            f"{what} is not finite in {int(bad.sum())} of {rows} rows (first: row {int(bad.nonzero()[0])}, "
            f"{value[bad][0].item()})"
        )
