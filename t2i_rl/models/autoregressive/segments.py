"""A conversation of texts and pictures: its segments, each with its part in the whole."""

from dataclasses import dataclass

import numpy as np

# the encoders that a picture is shown to: it is drawn by one and looked at by the other
GENERATION, UNDERSTANDING = "generation", "understanding"
BOTH = frozenset((GENERATION, UNDERSTANDING))


@dataclass(frozen=True, eq=False)
class Segment:
    """One text, or one picture uint8 `(H, W, 3)`.

    `role`: system, prompt, think (R1), draw (I1), question (T_q), reflect (R2), redraw (I2). `loss`: it is to be learnt; else it is context.
    `seen_by`: the encoders through which what follows sees a picture; a text is always seen. `drawn_as`: what the model wrote or drew, for that model alone (Janus:
    tokens, codes); None: found from the text, from the pixels.
    """

    role: str
    text: str | None = None
    image: np.ndarray | None = None
    loss: bool = False
    seen_by: frozenset[str] = frozenset()
    drawn_as: object = None

    @property
    def kind(self) -> str:
        return "text" if self.image is None else "image"

    def __eq__(self, other) -> bool:
        same = (self.role, self.text, self.loss, self.seen_by) == (other.role, other.text, other.loss, other.seen_by)
        return same and (self.image is None) == (other.image is None) and (self.image is None or np.array_equal(self.image, other.image))  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A text, whether it ended by itself, its length in tokens, and what the model wrote (see `Segment.drawn_as`)."""

    text: str
    finished: bool
    tokens: int
    drawn_as: object = None
