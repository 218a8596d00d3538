"""What a reward, a benchmark and a data module of a user's own must give, asked once before any weight loads."""

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from t2i_rl.core.numbers import Count, check_value, shown
from t2i_rl.errors import UserError
from t2i_rl.prompts import Prompt

_ABSENT = object()
DISTRIBUTIONS = ("conditional", "guided")


def check_reward(reward: Any, where: str) -> None:
    """Whether a reward says what it reads, and can be called with what was drawn.

    Raises:
        UserError: one line that names its class and what it must give.
    """
    name = f"{where} ({type(reward).__name__})"
    _takes(reward, 1, f"{name} must be callable as reward(rollout)")
    reads_images = getattr(reward, "needs_images", _ABSENT)
    if not isinstance(reads_images, bool):
        raise UserError(
            f"{name} must say needs_images = True or False: whether it reads pictures{_given(reads_images)}"
        )
    distribution = getattr(reward, "distribution", _ABSENT)
    if distribution not in (None, *DISTRIBUTIONS):
        raise UserError(
            f"{name} must say distribution = None, or {' or '.join(map(repr, DISTRIBUTIONS))} where it reads token "
            "statistics"
            f"{_given(distribution)}"
        )
    _sizes(reward, name)
    _names(reward, "needs_meta", name)
    for switch in ("needs_plans", "differentiable"):
        if not isinstance(getattr(reward, switch, False), bool):
            raise UserError(f"{name} must say {switch} = True or False{_given(getattr(reward, switch))}")
    if getattr(reward, "differentiable", False):
        _takes(
            getattr(reward, "score_pixels", None),
            2,
            f"{name} is differentiable, and must have score_pixels(pixels, prompts)",
        )
    if hasattr(reward, "refuses"):
        _takes(reward.refuses, 1, f"{name}.refuses must be callable as refuses(prompt)")


def check_benchmark(benchmark: Any, where: str = "benchmark") -> None:
    """Whether a benchmark has prompts of its own, a judge, features and a fingerprint.

    Raises:
        UserError: one line that names its class and what it must give.
    """
    name = f"{where} ({type(benchmark).__name__})"
    for method, arguments, call in (
        ("prompts", 0, "prompts()"),
        ("judge", 2, "judge(images, prompts)"),
        ("features", 1, "features(images)"),
        ("fingerprint", 0, "fingerprint()"),
    ):
        _takes(getattr(benchmark, method, None), arguments, f"{name} must have {call}")
    if not isinstance(getattr(benchmark, "name", None), str):
        raise UserError(f'{name} must have a name, like name = "my_benchmark"')
    check_value(getattr(benchmark, "samples_per_prompt", None), Count, f"{name}.samples_per_prompt")
    tags = {prompt.tag for prompt in check_prompts(benchmark.prompts(), f"{name}.prompts()")}
    tasks = _names(benchmark, "overall_tasks", name)
    if not tasks or not set(tasks) <= tags:
        raise UserError(
            f"{name} must say overall_tasks, the tags of its prompts that its overall is the mean of: of "
            f"{sorted(tags)}, not {shown(tasks)}"
        )
    _sizes(benchmark, name)
    try:
        json.dumps(_mapping(benchmark.fingerprint()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}.fingerprint() must be a dict of plain values, as JSON has them: {error}") from error


def check_data(data: Any, where: str = "data") -> None:
    """Whether a data module has prompts, a batch size and batches.

    Raises:
        UserError: one line that names its class and what it must give.
    """
    name = f"{where} ({type(data).__name__})"
    _takes(getattr(data, "train_dataloader", None), 0, f"{name} must have train_dataloader()")
    check_value(getattr(data, "batch_size", None), Count, f"{name}.batch_size")
    prompts = getattr(data, "prompts", None)
    bring_their_own = getattr(data, "gives", "prompts") == "trajectories"  # those that lie on the disk
    if prompts or not bring_their_own:
        check_prompts(prompts, f"{name}.prompts")


def check_prompts(prompts: Any, name: str) -> Sequence[Prompt]:
    """The prompts, if they are some, each a `Prompt`.

    Raises:
        UserError: they are not.
    """
    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise UserError(f"{name} must be a list of one Prompt or more, not {_kind_of(prompts)}")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise UserError(f"{name}[{number}] must be a t2i_rl.prompts.Prompt, not {_kind_of(prompt)}")
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
        lacking = [part for part in ("strict", "lenient", "score", "defects") if not hasattr(verdict, part)]
        if lacking:
            raise UserError(
                f"{name} must give verdicts with strict, lenient, score and defects; {_kind_of(verdict)} has no "
                f"{lacking[0]}"
            )
        if not (isinstance(verdict.strict, bool) and isinstance(verdict.lenient, bool)):
            raise UserError(
                f"{name} must give strict and lenient as True or False, not {shown(verdict.strict)} and "
                f"{shown(verdict.lenient)}"
            )
        if not (isinstance(verdict.score, int | float) and 0 <= verdict.score <= 1):
            raise UserError(f"{name} must give a score from 0 to 1, not {shown(verdict.score)}")
        if not (isinstance(verdict.defects, list) and all(isinstance(defect, str) for defect in verdict.defects)):
            raise UserError(f"{name} must give defects as a list of texts, not {shown(verdict.defects)}")
    return list(verdicts)


def features_of(benchmark: Any, images: np.ndarray) -> np.ndarray:
    """A benchmark's features `(N, D)` of pictures.

    Raises:
        UserError: they are not, in one line that names the class and what its features must be.
    """
    name, rows, features = f"{type(benchmark).__name__}.features", len(images), benchmark.features(images)
    if not isinstance(features, np.ndarray) or features.ndim != 2 or len(features) != rows:
        shape = f"one of shape {features.shape}" if isinstance(features, np.ndarray) else _kind_of(features)
        raise UserError(f"{name} must give an array of {rows} rows, one a picture, not {shape}")
    if not np.issubdtype(features.dtype, np.number) or not np.isfinite(features).all():
        raise UserError(f"{name} must give finite numbers")
    return features


def _takes(part: Callable | None, count: int, otherwise: str) -> None:
    if not callable(part):
        raise UserError(otherwise)
    try:
        inspect.signature(part).bind(*[None] * count)
    except TypeError as error:
        raise UserError(f"{otherwise} ({error})") from error
    except ValueError:  # written in C, and without a signature
        return


def _sizes(part: Any, name: str) -> None:
    sizes = getattr(part, "image_sizes", None)
    if sizes is None:
        return
    if (
        not isinstance(sizes, Collection)
        or isinstance(sizes, str)
        or not all(type(size) is int and size > 0 for size in sizes)
    ):
        raise UserError(f"{name} must say image_sizes as whole numbers of pixels, like (32,), not {shown(sizes)}")


def _names(part: Any, attribute: str, name: str) -> Sequence[str]:
    names = getattr(part, attribute, ())
    if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(key, str) for key in names):
        raise UserError(f'{name} must say {attribute} as several names, like ("color",), not {shown(names)}')
    return tuple(names)


def _mapping(value: Any) -> Mapping:
    if not isinstance(value, Mapping):
        raise TypeError(f"it is {_kind_of(value)}")
    return value


def _given(value: Any) -> str:
    return "" if value is _ABSENT else f", not {shown(value)}"


def _kind_of(value: Any) -> str:
    return "nothing" if value is None or value is _ABSENT else f"a {type(value).__name__}"
