"""What inference writes, training reads and the report shows: a list of segments, each with its part in the whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.core.seeding import derive_seed
from t2i_rl.models.autoregressive.segments import BOTH, Segment


@dataclass
class Trajectory:
    """Segments in order; the `seed` that every draw in it derives from, and the `settings` (guidance, temperatures,
    context policy) as they were.

    Of one that was drawn: for each text its `text_tokens` and whether it is `unfinished` (empty, or cut, at every try);
    for each picture the `seconds` that its turn took (a batch's, shared out; the last one's with the text that ended
    there) and, with a judge, its `scores`; `answer` is the number of the picture that stands.
    """

    segments: tuple[Segment, ...]
    seed: int | None = None
    settings: dict = field(default_factory=dict)
    text_tokens: list[int] = field(default_factory=list)
    unfinished: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    answer: int | None = None

    @property
    def images(self) -> list[np.ndarray]:
        return [segment.image for segment in self.segments if segment.image is not None]

    @property
    def texts(self) -> list[str]:
        """What was thought and reflected, in order."""
        return [segment.text or "" for segment in self.segments if segment.role in ("think", "reflect")]

    def seed_of(self, *parts: int | str) -> int:
        """The seed of one of its draws, by what is drawn."""
        assert self.seed is not None  # only a trajectory that is drawn is asked
        return derive_seed(self.seed, *parts)


@dataclass(frozen=True)
class Part:
    """One segment as a mode has it (IRGL, arXiv 2509.06945 section 3.3)."""

    role: str
    kind: str
    loss: bool = False


PROMPT, QUESTION = Part("prompt", "text"), Part("question", "text")
THOUGHT, REFLECTION = Part("think", "text"), Part("reflect", "text")
WEAK, GOOD = Part("draw", "image"), Part("redraw", "image")


def learnt(part: Part) -> Part:
    return replace(part, loss=True)


MODES = {
    "initial_thinking_understanding_learning": (PROMPT, WEAK, QUESTION, learnt(THOUGHT)),
    "initial_thinking_generation_learning": (PROMPT, learnt(THOUGHT)),
    "initial_full_learning": (PROMPT, learnt(THOUGHT), learnt(WEAK)),
    "improving_thinking_understanding_learning": (PROMPT, WEAK, GOOD, QUESTION, learnt(REFLECTION)),
    "improving_thinking_generation_learning": (PROMPT, THOUGHT, WEAK, learnt(REFLECTION)),
    "improving_full_learning": (PROMPT, THOUGHT, WEAK, learnt(REFLECTION), learnt(GOOD)),
}
STAGES = {
    1: dict(zip(MODES, (0.125, 0.125, 0.25, 0.125, 0.125, 0.25), strict=True)),
    2: {"initial_full_learning": 0.5, "improving_full_learning": 0.5},
}


def in_mode(segments: Sequence[Segment], mode: str, where: str) -> tuple[Segment, ...]:
    """The segments with the roles that `mode` gives them; a text in front of the prompt is the system's.

    Raises:
        UserError: there is no such mode, or kind, loss or encoders of a segment are not the mode's; `where` and the
            segment are named.
    """
    if mode not in MODES:
        raise UserError(f"{where}: there is no mode {mode!r}; the modes are {', '.join(MODES)}")
    parts = MODES[mode]
    if len(segments) == len(parts) + 1 and segments[0].kind == "text" and not segments[0].loss:
        parts = (Part("system", "text"), *parts)
    if len(segments) != len(parts):
        wanted = ", ".join(part.role for part in parts)
        raise UserError(f"{where}: {len(segments)} segments, where {mode} has {len(parts)}: {wanted}")
    for number, (segment, part) in enumerate(zip(segments, parts, strict=True)):
        place = f"{where}: segment {number} ({part.role})"
        for name in ("kind", "loss"):
            value, asked = getattr(segment, name), getattr(part, name)
            if value != asked:
                raise UserError(f"{place}: {name} is {value}, and {mode} asks for {asked}")
        if part.kind == "text" and (part.loss or part.role == "prompt") and not (segment.text or "").strip():
            raise UserError(f"{place}: the text is empty")
        if part.kind == "image" and not part.loss and segment.seen_by != BOTH:
            raise UserError(f"{place}: a picture in the context is seen by both encoders (need_vae, need_vit)")
    return tuple(replace(segment, role=part.role) for segment, part in zip(segments, parts, strict=True))
