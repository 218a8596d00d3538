"""The inference loop: think, draw, look, reflect, draw better, for any number of rounds (IRG section 3; specification sections 1.1 to 1.6)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    """The shape that training has: system and prompt, the last picture, the text that it was drawn from, and what came after."""
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


@dataclass
class Interleave:
    """Draws trajectories with a model that writes and draws over lists of segments (`irg.janus.InterleavedJanus`).

    Args:
        rounds: pictures a prompt; 1 thinks and draws.
        policy: what a later round sees, `append` everything, or the `window` of training's shape.
        guidance_scale: of the first picture, against the model's own unconditional.
        reflection_scale, image_scale: of later pictures, against the context without the latest reflection, and without pictures; one number, or one for each
            later round (the last serves those beyond).
        prompt_scale: of later pictures, against the model's own unconditional, in the same manner; IRG has none (1).
        text_temperature, image_temperature: of sampling.
        max_tokens: of a text; one that is empty or cut there is written again with another seed, `retries` times at most, and then kept and counted.
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

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise UserError(f"method.interleave.policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        check_arguments(Interleave, vars(self), "method.interleave")
        for name in ("reflection_scale", "image_scale", "prompt_scale"):
            value = getattr(self, name)
            scales = list(value) if isinstance(value, Sequence) else [value]
            if not scales:
                raise UserError(f"method.interleave.{name} must be a number, or one for each later round, not []")
            setattr(self, name, [float(scale) for scale in scales])
        if self.stop is not None and not (isinstance(self.stop, str) and _plain(self.stop).strip()):
            raise UserError(f'method.interleave.stop must be the words that a reflection ends with, like "stop.", or null, not {self.stop!r}')  # fmt: skip

    def every_round(self) -> "Interleave":
        """The same without stop and choice: what a round would draw is then known of every prompt."""
        return replace(self, stop=None, stop_above=None, choose=False)

    def run(
        self, model, prompts: Sequence[str], seeds: Sequence[int], judge: Callable | None = None
    ) -> list[Trajectory]:
        """A trajectory a prompt; row `i` depends on `seeds[i]` alone.

        `judge(numbers, images)` scores pictures of the prompts of these numbers.

        Raises:
            UserError: a judge is needed and there is none.
        """
        if judge is None and (self.choose or self.stop_above is not None):
            raise UserError("choose and stop_above need a judge: +reward@method.judge=soft_oracle")
        rows = [Trajectory((Segment("prompt", text=prompt),), seed, dict(vars(self))) for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
        going = list(range(len(prompts)))
        for number in range(self.rounds):
            written, drawn = ("think", "draw") if number == 0 else ("reflect", "redraw")
            started = time.perf_counter()
            self._write(model, [rows[i] for i in going], written, number)
            words = (time.perf_counter() - started) / len(going)
            ended = [i for i in going if number and says_stop(rows[i].segments[-1].text, self.stop)]
            for i in ended:
                rows[i].seconds[-1] += words
            going = [i for i in going if i not in ended]
            if not going:
                break
            started = time.perf_counter()
            images, drawn_as = self._draw(model, [rows[i] for i in going], drawn, number)
            drawing = (time.perf_counter() - started) / len(going)
            for i, image, codes in zip(going, images, drawn_as, strict=True):
                rows[i].segments += (Segment(drawn, image=image, seen_by=BOTH, drawn_as=codes),)
                rows[i].seconds.append(words + drawing)
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

    def _write(self, model, rows: list[Trajectory], role: str, number: int) -> None:
        """Add a text to each trajectory."""
        contexts = [self.seen(row.segments) for row in rows]
        seeds = [derive_seed(row.seed, role, number) for row in rows]
        texts: list[Written | None] = [None] * len(rows)
        left = list(range(len(rows)))
        for attempt in range(self.retries + 1):
            tries = [derive_seed(seeds[i], attempt) for i in left]
            for i, found in zip(left, model.write([contexts[i] for i in left], role, tries, self.max_tokens, self.text_temperature), strict=True):  # fmt: skip
                texts[i] = found
            left = [i for i in left if not (texts[i].text and texts[i].finished)]
            if not left:
                break
        for i, (row, found) in enumerate(zip(rows, texts, strict=True)):
            row.segments += (Segment(role, text=found.text, drawn_as=found.drawn_as),)
            row.text_tokens.append(found.tokens)
            row.unfinished.append(i in left)

    def _draw(self, model, rows: list[Trajectory], role: str, number: int) -> tuple[np.ndarray, Sequence]:
        seen = [self.seen(row.segments) for row in rows]
        seeds = [derive_seed(row.seed, role, number) for row in rows]
        if role == "draw":
            return model.draw([seen, [None] * len(seen)], role, (self.guidance_scale,), seeds, self.image_temperature)
        branches = [seen, *([make(context) for context in seen] for make in (without_reflection, without_images))]
        scales = (self.reflection_scale, self.image_scale, self.prompt_scale)
        guidance = tuple(each[min(number, len(each)) - 1] for each in scales)
        branches.append([None] * len(seen))
        return model.draw(branches, role, guidance, seeds, self.image_temperature)
