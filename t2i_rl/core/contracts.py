"""What a reward, a benchmark and a model owe: small base classes, whose defaults are what most of them do."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from t2i_rl.core.prompts import Prompt
from t2i_rl.core.readers import ReadsTexts
from t2i_rl.core.stated import STATED, Stated


@dataclass(kw_only=True)
class Drawn:
    """What was drawn, as a reward reads it: `B` rows, those of one prompt's group adjacent.

    images: uint8 `(B, H, W, 3)`; None where nobody asked for pictures.
    seeds: a row's randomness is a function of its seed.
    plans: the text that an image was drawn from beside its prompt; empty strings where none was written.
    """

    prompts: list[Prompt]
    seeds: list[int]
    images: np.ndarray | None = None
    group_size: int = 1
    plans: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plans = self.plans or [""] * len(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, chosen: slice) -> Self:
        """The same for some rows only, as one micro-batch."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return type(self)(**{name: rows_of(value, chosen) for name, value in values.items()})


def rows_of(value: Any, chosen: slice) -> Any:
    """Some rows of a list, an array, a tensor, or a dataclass that holds them; anything else is said of all rows."""
    if isinstance(value, list | torch.Tensor | np.ndarray):
        return value[chosen]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(rows_of(getattr(value, part.name), chosen) for part in fields(value)))
    return value


@dataclass
class RewardOutput:
    """`total` `(B,)` is what is trained on; `parts` `(B,)` each are logged beside it."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


class Reward:
    """A number for each row that was drawn. A subclass gives `__call__`, and says below what it reads.

    reads: `Drawn`, or a subclass of it with more than pictures: `TokenRollout` has an autoregressive model's tokens.
    needs_images: whether it reads pictures; where no reward does, none are decoded.
    needs_plans: whether it reads written plans, so that `method.plan` must be true.
    needs_meta: keys of a prompt's metadata that it judges by.
    image_sizes: sides in pixels of the pictures that it reads; empty for any.
    differentiable: whether `score_pixels` has a gradient, for searches over noise.
    distribution: `conditional` or `guided` where it reads token statistics: whose.
    judge_of: the name of the benchmark that judges by the same rule, and may not be optimised while it is measured.
    parts: the rewards that this one is made of, by name.
    """

    reads: type[Drawn] = Drawn
    needs_images: bool = True
    needs_plans: bool = False
    needs_meta: tuple[str, ...] = ()
    image_sizes: tuple[int, ...] = ()
    differentiable: bool = False
    distribution: str | None = None
    judge_of: str | None = None
    parts: Mapping[str, "Reward"] = {}

    def __call__(self, drawn: Drawn) -> RewardOutput:
        """One finite number a row."""
        raise NotImplementedError(f"{type(self).__name__} must have __call__(drawn), which returns a RewardOutput")

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """The same `(B,)` with gradients to float32 pixels `(B, 3, H, W)` in [0, 1], where `differentiable`."""
        raise NotImplementedError(f"{type(self).__name__} has no gradient")

    def refuses(self, prompt: Prompt) -> str | None:
        """Why it cannot judge a prompt; None where it can."""
        return None


class Defect(NamedTuple):
    """One thing that is wrong with a picture: its `kind`, by which it is counted, and the `text` that a reader sees."""

    kind: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a picture.

    strict: exactly what was asked, and nothing else. lenient: by the benchmark's published rule; the same where it has
    one rule. score: partial credit in [0, 1]. defects: what is wrong; empty only if strict.
    """

    strict: bool
    lenient: bool
    score: float
    defects: list[Defect] = field(default_factory=list)


@dataclass(frozen=True)
class Detection:
    """One object in a picture.

    label: its class. box: `(x1, y1, x2, y2)` in pixels. score: a detector's confidence in [0, 1].
    """

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        """`(x, y)` in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Column(NamedTuple):
    """One figure of a picture beside its verdict, and how tables show its mean over pictures.

    name: what results call it. label: what tables call it; its name, where empty.
    tasks: tags of the prompts that it is measured on; empty for all.
    more_is_better: whether a larger mean is a better one.
    digits: after the point; None for a share, which is shown in percent.
    """

    name: str
    label: str = ""
    tasks: tuple[str, ...] = ()
    more_is_better: bool = True
    digits: int | None = None


class Benchmark:
    """Prompts and a judge. A subclass gives `name`, `overall_tasks`, `prompts` and `judge`.

    name, version: what results are called by; the version goes up whenever a number would change.
    samples_per_prompt: pictures of each prompt.
    overall_tasks: tags of prompts; `overall` is the mean of their accuracies.
    image_sizes: sides in pixels of the pictures that it judges; empty for any.
    needs_meta: keys of a prompt's metadata that its judge reads; None: it judges pictures of its own prompts alone.
    columns: what it measures of a picture beside the verdict; `measured` gives the values.
    """

    name: str = ""
    version: int = 1
    samples_per_prompt: int = 1
    overall_tasks: tuple[str, ...] = ()
    image_sizes: tuple[int, ...] = ()
    needs_meta: tuple[str, ...] | None = None
    columns: tuple[Column, ...] = ()

    def prompts(self) -> list[Prompt]:
        """Its prompts, each with an id of its own and its task as `tag`."""
        raise NotImplementedError(f"{type(self).__name__} must have prompts()")

    def judge(self, images: np.ndarray, prompts: list[Prompt]) -> list[Verdict]:
        """A verdict on each of `images` uint8 `(N, H, W, 3)`."""
        raise NotImplementedError(f"{type(self).__name__} must have judge(images, prompts)")

    def measured(self, prompt: Prompt, verdict: Verdict) -> dict[str, float]:
        """A picture's value in each of `columns`, by name; one that says nothing of this picture is left out.

        What only its judge saw comes here in a subclass of `Verdict`.
        """
        return {}

    def features(self, images: np.ndarray) -> np.ndarray | None:
        """What diversity is measured on, float32 `(N, D)`; None where it is not measured, and then for all pictures."""
        return None

    def reference_features(self) -> np.ndarray | None:
        """Features `(M, D)` of right pictures, which the Frechet distance is taken to; None where there are none."""
        return None

    def faults(self, images: np.ndarray, prompts: list[Prompt]) -> list[list[str]] | None:
        """What is wrong with each picture in the words of a reflection; None where it has no such words."""
        return None

    def named(self, text: str) -> list[str]:
        """The faults that a reflection names, in the words of `faults`."""
        return []

    def fingerprint(self) -> dict:
        """Everything that its numbers depend on, as plain values."""
        return {"name": self.name, "version": self.version, "samples_per_prompt": self.samples_per_prompt}


class Judging:
    """A callback that draws while training and has it judged: by a benchmark, or by rewards by name."""

    benchmark: Benchmark | None = None
    judges: Mapping[str, Reward] = {}

    def check(self, where: str) -> None:
        """Refuse what cannot be measured, before any weight loads; `where` is its setting, as `callbacks.<name>`.

        Raises:
            UserError: one line that names the setting, and what it may be.
        """


@dataclass
class Generation:
    """Images uint8 `(B, H, W, 3)`; `plans` are the texts that they were drawn from, empty where none was written;
    `image_ids` `(B, N)` the tokens of an autoregressive model."""

    images: np.ndarray
    plans: list[str] = field(default_factory=list)
    plan_lengths: list[int] = field(default_factory=list)
    image_ids: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.plans = self.plans or [""] * len(self.images)
        self.plan_lengths = self.plan_lengths or [0] * len(self.images)


class ImageModel(Stated, nn.Module, ReadsTexts):
    """What draws. A subclass gives `family`, `image_size` and `generate`.

    family: which methods can train it. kind: the row of a variant (conf/variant) that is meant for it.
    path: where its weights come from. attached: soft tokens at work in it, None without.
    """

    stated = STATED["model"]
    fixed = ("family",)
    family: str = ""
    kind: str = ""
    path: str = ""
    attached = None

    @classmethod
    def image_size(cls, settings: Mapping[str, Any]) -> int:
        """Side in pixels of the pictures that a model of these settings draws, known before any weight loads."""
        raise NotImplementedError(f"{cls.__name__} must have image_size(settings)")

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Refuse settings that cannot work, before any weight loads.

        Raises:
            UserError: one line that names the setting and what it may be.
        """

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def twin(self) -> Self:
        """A frozen copy for scoring, which a method with a KL takes where no adapter can be switched off."""
        raise NotImplementedError(f"{type(self).__name__} must have twin(), or learn with method.lora alone")

    def sampling(self) -> dict[str, Any]:
        """What a picture depends on beside its prompt, its seed and the weights."""
        return {}

    def prepare(self) -> None:
        """Called before pictures are drawn, after the weights changed."""

    def generate(self, prompts: list[str], seeds: list[int], mode: str = "direct", fresh: bool = True) -> Generation:
        """A picture of each prompt.

        Args:
            mode: `direct`, or `plan` where the model writes one first.
            fresh: the weights may have changed since the last call of `prepare`.
        """
        raise NotImplementedError(f"{type(self).__name__} must have generate(prompts, seeds, mode, fresh)")
