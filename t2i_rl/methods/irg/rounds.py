"""The inference loop: think, draw, look, reflect, draw better, for any number of rounds (IRG, section 3)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Finite, Guidance, Guidances, Temperature, Whole, check_arguments
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.models.autoregressive.segments import BOTH, Segment, Written

POLICIES = ("append", "window")


def without_reflection(segments: Sequence[Segment]) -> list[Segment]:
    """The context that lacks only the latest reflection."""
    last = max(number for number, segment in enumerate(segments) if segment.role == "reflect")
    return [segment for number, segment in enumerate(segments) if number != last]


def without_images(segments: Sequence[Segment]) -> list[Segment]:
    """The context that lacks every picture, and nothing else."""
    return [segment for segment in segments if segment.kind == "text"]


def windowed(segments: Sequence[Segment]) -> list[Segment]:
    """The shape that training has: system and prompt, the last picture with its text, and what came after."""
    pictures = [number for number, segment in enumerate(segments) if segment.kind == "image"]
    if not pictures:
        return list(segments)
    head = [segment for segment in segments if segment.role in ("system", "prompt")]
    text, picture = segments[pictures[-1] - 1], segments[pictures[-1]]
    return [*head, replace(text, role="think"), replace(picture, role="draw"), *segments[pictures[-1] + 1 :]]


def says_stop(text: str, stop: str | None) -> bool:
    """Whether a reflection ends with `stop` after a mark, in whatever case and punctuation: it finds nothing wrong."""
    if stop is None or not _plain(text).endswith(_plain(stop)):
        return False
    before = _plain(text).removesuffix(_plain(stop)).rstrip(" \t")
    return not before or not before[-1].isalnum()


def _plain(text: str) -> str:
    return text.casefold().rstrip(" .!\n")


class WritesAndDraws(Protocol):
    """What `Rounds` asks of a model over lists of segments; see `InterleavedJanus`."""

    def write(
        self,
        contexts: Sequence[Sequence[Segment]],
        role: str,
        seeds: list[int],
        max_tokens: int,
        temperature: float,
    ) -> list[Written]:
        """A text of `role` after each context."""

    def draw(
        self,
        branches: Sequence[Sequence[Sequence[Segment] | None]],
        role: str,
        guidance: Sequence[float],
        seeds: list[int],
        temperature: float,
    ) -> tuple[np.ndarray, Sequence]:
        """Images uint8 `(B, H, W, 3)` of `role` after each context of the first branch, guided by the others; and what
        each is `Segment.drawn_as`."""


@dataclass
class Rounds:
    """Draws trajectories with a model that writes and draws over lists of segments (see `WritesAndDraws`).

    Args:
        rounds: pictures a prompt; 1 thinks and draws.
        policy: what a later round sees, `append` everything, or the `window` of training's shape.
        guidance_scale: of the first picture, against the model's own unconditional.
        reflection_scale, image_scale: of later pictures, against the context without the latest reflection, and without
            pictures; one number, or one for each later round (the last serves those beyond).
        prompt_scale: of later pictures, against the model's own unconditional, in the same manner; IRG has none (1).
        text_temperature, image_temperature: of sampling.
        max_tokens: of a text; one that is empty or cut there is written again with another seed, `retries` times at
            most, and then kept and counted.
        stop: how a reflection ends that finds nothing wrong; the trajectory ends there. None: every round is drawn.
        stop_above: a judge's score of the last picture at which the trajectory ends; needs a judge.
        choose: the answer is the picture that the judge scores highest, not the last; needs a judge.

    Raises:
        UserError: an option outside its range.
    """

    rounds: Count = 2
    policy: str = "append"
    guidance_scale: Guidance = 5.0
    reflection_scale: Guidances = 2.0  # Hydra knows no union of a number and a list
    image_scale: Guidances = 2.0
    prompt_scale: Guidances = 1.0
    text_temperature: Temperature = 0.3
    image_temperature: Temperature = 1.0
    max_tokens: Count = 128
    retries: Whole = 3
    stop: str | None = None
    stop_above: Finite | None = None
    choose: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"method.interleave.policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        check_arguments(Rounds, vars(self), "method.interleave")
        for name in ("reflection_scale", "image_scale", "prompt_scale"):
            value = getattr(self, name)
            scales = list(value) if isinstance(value, Sequence) else [value]
            if not scales:
                raise UserError(f"method.interleave.{name} must be a number, or one for each later round, not []")
            setattr(self, name, [float(scale) for scale in scales])
        if self.stop is not None and not (isinstance(self.stop, str) and _plain(self.stop).strip()):
            raise UserError(
                'method.interleave.stop must be the words that a reflection ends with, like "stop.", or null, not '
                f"{self.stop!r}"
            )

    def every_round(self) -> "Rounds":
        """The same without stop and choice: what a round would draw is then known of every prompt."""
        return replace(self, stop=None, stop_above=None, choose=False)

    def run(
        self, model: WritesAndDraws, prompts: Sequence[str], seeds: Sequence[int], judge: Callable | None = None
    ) -> list[Trajectory]:
        """A trajectory a prompt; row `i` depends on `seeds[i]` alone.

        `judge(numbers, images)` scores pictures of the prompts of these numbers.

        Raises:
            UserError: a judge is needed and there is none.
        """
        if judge is None and (self.choose or self.stop_above is not None):
            raise UserError("choose and stop_above need a judge: +reward@method.judge=soft_oracle")
        rows = [
            Trajectory((Segment("prompt", text=prompt),), seed, dict(vars(self)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        going = list(range(len(prompts)))
        for number in range(self.rounds):
            text_role, image_role = ("think", "draw") if number == 0 else ("reflect", "redraw")
            started = time.perf_counter()
            self._write(model, [rows[i] for i in going], text_role, number)
            seconds_writing = (time.perf_counter() - started) / len(going)
            ended = [i for i in going if number and says_stop(rows[i].texts[-1], self.stop)]
            for i in ended:
                rows[i].seconds[-1] += seconds_writing
            going = [i for i in going if i not in ended]
            if not going:
                break
            started = time.perf_counter()
            images, drawn_as = self._draw(model, [rows[i] for i in going], image_role, number)
            seconds_drawing = (time.perf_counter() - started) / len(going)
            for i, image, codes in zip(going, images, drawn_as, strict=True):
                rows[i].segments += (Segment(image_role, image=image, seen_by=BOTH, drawn_as=codes),)
                rows[i].seconds.append(seconds_writing + seconds_drawing)
            if judge is not None:
                for i, score in zip(going, judge(going, images), strict=True):
                    rows[i].scores.append(float(score))
            going = [i for i in going if self.stop_above is None or rows[i].scores[-1] < self.stop_above]
            if not going:
                break
        for row in rows:
            row.answer = int(np.argmax(row.scores)) if self.choose else len(row.images) - 1
        return rows

    def seen(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """What a later round sees of a conversation."""
        return windowed(segments) if self.policy == "window" else segments

    def _write(self, model: WritesAndDraws, rows: list[Trajectory], role: str, number: int) -> None:
        """Add a text to each trajectory."""
        contexts = [self.seen(row.segments) for row in rows]
        seeds = [row.seed_of(role, number) for row in rows]
        texts: dict[int, Written] = {}
        unfinished = list(range(len(rows)))
        for attempt in range(self.retries + 1):
            seeds_now = [derive_seed(seeds[i], attempt) for i in unfinished]
            contexts_now = [contexts[i] for i in unfinished]
            written = model.write(contexts_now, role, seeds_now, self.max_tokens, self.text_temperature)
            for i, text in zip(unfinished, written, strict=True):
                texts[i] = text
            unfinished = [i for i in unfinished if not (texts[i].text and texts[i].finished)]
            if not unfinished:
                break
        for i, row in enumerate(rows):
            text = texts[i]
            row.segments += (Segment(role, text=text.text, drawn_as=text.drawn_as),)
            row.text_tokens.append(text.tokens)
            row.unfinished.append(i in unfinished)

    def _draw(
        self, model: WritesAndDraws, rows: list[Trajectory], role: str, number: int
    ) -> tuple[np.ndarray, Sequence]:
        contexts = [self.seen(row.segments) for row in rows]
        seeds = [row.seed_of(role, number) for row in rows]
        unconditional = [None] * len(rows)
        branches: list[Sequence[Sequence[Segment] | None]]
        guidance: tuple[float, ...]
        if role == "draw":
            branches, guidance = [contexts, unconditional], (self.guidance_scale,)
        else:
            lacking = [[without(context) for context in contexts] for without in (without_reflection, without_images)]
            branches = [contexts, *lacking, unconditional]
            scales = (self.reflection_scale, self.image_scale, self.prompt_scale)
            guidance = tuple(by_round[min(number, len(by_round)) - 1] for by_round in scales)
        return model.draw(branches, role, guidance, seeds, self.image_temperature)
