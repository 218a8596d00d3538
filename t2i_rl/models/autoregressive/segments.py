"""A conversation of texts and images: its segments, each with its part in the whole."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# the encoders that an image is shown to: it is drawn by one and looked at by the other
GENERATION, UNDERSTANDING = "generation", "understanding"
BOTH = frozenset((GENERATION, UNDERSTANDING))


@dataclass(frozen=True, eq=False)
class Segment:
    """One text, or one image uint8 `(H, W, 3)`.

    role: system, prompt, think (R1), draw (I1), question (T_q), reflect (R2), redraw (I2).
    loss: it is to be learnt; else it is context.
    seen_by: the encoders through which what follows sees an image; a text is always seen.
    drawn_as: what the model wrote or drew, for that model alone (Janus: tokens, codes); None where
        it is to be found from the text or from the pixels.
    """

    role: str
    text: str | None = None
    image: np.ndarray | None = None
    loss: bool = False
    seen_by: frozenset[str] = frozenset()
    drawn_as: Any = None

    @property
    def kind(self) -> str:
        return "text" if self.image is None else "image"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Segment):
            return NotImplemented
        same = (self.role, self.text, self.loss, self.seen_by) == (other.role, other.text, other.loss, other.seen_by)
        if self.image is None or other.image is None:
            return same and self.image is other.image
        return same and np.array_equal(self.image, other.image)


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    finished: it ended by itself. tokens: its length. drawn_as: see `Segment`.
    """

    text: str
    finished: bool
    tokens: int
    drawn_as: Any = None
