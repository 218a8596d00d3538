"""The inference loop: think, draw, look, reflect, draw better, for any number of rounds (IRG section 3; specification sections 1.1 to 1.6)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from t2i_rl.errors import UserError
from t2i_rl.irg.trajectory import BOTH, Segment, Trajectory
from t2i_rl.seeding import derive_seed

POLICIES = ("append", "window")


def without_reflection(segments: Sequence[Segment]) -> list[Segment]:
    """The context that lacks only the latest reflection."""
    last = max(number for number, segment in enumerate(segments) if segment.role == "reflect")
    return [segment for number, segment in enumerate(segments) if number != last]


def without_images(segments: Sequence[Segment]) -> list[Segment]:
    """The context that lacks every picture, and nothing else."""
    return [segment for segment in segments if segment.kind == "text"]


def windowed(segments: Sequence[Segment]) -> list[Segment]:
    """System and prompt, the last text written, the last picture drawn: the shape that training has."""
    head = [segment for segment in segments if segment.role in ("system", "prompt")]
    texts = [segment for segment in segments if segment.role in ("think", "reflect")]
    images = [segment for segment in segments if segment.kind == "image"]
    return [*head, *texts[-1:], *images[-1:]]


@dataclass
class Interleave:
    """Draws trajectories with a model that writes and draws over lists of segments (`irg.janus.InterleavedJanus`).

    Args:
        rounds: pictures a prompt; 1 thinks and draws.
        policy: what a later round sees, `append` everything, or the `window` of training's shape.
        guidance_scale: of the first picture, against the model's own unconditional.
        reflection_scale, image_scale: of later pictures, against the context without the latest reflection, and without pictures.
        text_temperature, image_temperature: of sampling.
        max_tokens: of a text; one that is empty or cut there is written again with another seed, `retries` times at most.
        stop: a text that says no change is needed; the trajectory ends there. None: every round is drawn.

    Raises:
        UserError: an option outside its range.
    """

    rounds: int = 2
    policy: str = "append"
    guidance_scale: float = 5.0
    reflection_scale: float = 2.0
    image_scale: float = 2.0
    text_temperature: float = 0.3
    image_temperature: float = 1.0
    max_tokens: int = 128
    retries: int = 3
    stop: str | None = None

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise UserError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        for name, least in (("rounds", 1), ("max_tokens", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be {least} or more, not {getattr(self, name)}")

    def run(self, model, prompts: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        """A trajectory a prompt; row `i` depends on `seeds[i]` alone.

        Raises:
            UserError: a text was empty or unfinished at every try.
        """
        segments = [[Segment("prompt", text=prompt)] for prompt in prompts]
        going = list(range(len(prompts)))
        for number in range(self.rounds):
            written, drawn = ("think", "draw") if number == 0 else ("reflect", "redraw")
            texts = self._write(model, [self._seen(segments[i]) for i in going], written, [derive_seed(seeds[i], written, number) for i in going])  # fmt: skip
            for i, text in zip(going, texts, strict=True):
                segments[i].append(Segment(written, text=text))
            going = [i for i in going if self.stop is None or segments[i][-1].text != self.stop]
            if not going:
                break
            images = self._draw(model, [segments[i] for i in going], drawn, [derive_seed(seeds[i], drawn, number) for i in going])  # fmt: skip
            for i, image in zip(going, images, strict=True):
                segments[i].append(Segment(drawn, image=image, seen_by=BOTH))
        settings = dict(vars(self))
        return [Trajectory(tuple(row), seed, settings) for row, seed in zip(segments, seeds, strict=True)]

    def _seen(self, segments: list[Segment]) -> list[Segment]:
        return windowed(segments) if self.policy == "window" else segments

    def _write(self, model, contexts: list[list[Segment]], role: str, seeds: list[int]) -> list[str]:
        texts: list[str | None] = [None] * len(contexts)
        for attempt in range(self.retries + 1):
            left = [i for i, text in enumerate(texts) if text is None]
            if not left:
                break
            tries = [derive_seed(seeds[i], attempt) for i in left]
            found = model.write([contexts[i] for i in left], role, tries, self.max_tokens, self.text_temperature)
            for i, (text, finished) in zip(left, found, strict=True):
                texts[i] = text if text and finished else None
        bad = [i for i, text in enumerate(texts) if text is None]
        if bad:
            raise UserError(
                f"{contexts[bad[0]][0].text!r}: the {role} text was empty or longer than {self.max_tokens} tokens in {self.retries + 1} tries: raise max_tokens or retries"
            )
        return texts

    def _draw(self, model, contexts: list[list[Segment]], role: str, seeds: list[int]) -> np.ndarray:
        seen = [self._seen(context) for context in contexts]
        if role == "draw":
            branches, guidance = [seen, [None] * len(seen)], (self.guidance_scale,)
        else:
            makers: tuple[Callable, ...] = (without_reflection, without_images)
            branches = [seen, *([make(context) for context in seen] for make in makers)]
            guidance = (self.reflection_scale, self.image_scale)
        return model.draw(branches, role, guidance, seeds, self.image_temperature)
