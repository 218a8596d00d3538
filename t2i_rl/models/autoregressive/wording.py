"""A conversation as pieces: its words by their tokens, its images as they are drawn or seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from t2i_rl.core.tokenizing import ids_of
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.segments import GENERATION, UNDERSTANDING, Segment

if TYPE_CHECKING:  # which makes one of these over itself
    from t2i_rl.models.autoregressive.janus import Janus


@dataclass
class Piece:
    """A part of a conversation that has one kind of embeddings.

    kind: `words` that have `ids`, or an `image` as it is `drawn` or `seen`. codes: of an image that
    the model drew itself. learnt: the piece, and a text's end, are predicted from the position
    before them on.
    """

    kind: str
    ids: list[int] = field(default_factory=list)
    image: np.ndarray | None = None
    codes: torch.Tensor | None = None
    learnt: bool = False


class Wording:
    """Janus's chat format around the segments of a conversation; it reads no weights."""

    def __init__(self, janus: "Janus"):
        self.janus = janus
        self.cues = {"reflect": janus.chat.reflect, "redraw": janus.chat.redraw}

    def pieces(self, segments: Sequence[Segment], opening: str | None = None) -> list[Piece]:
        """The pieces of a conversation; with `opening`, up to a segment of that role."""
        special, pieces = self.janus.special, []
        if not segments or segments[0].role not in ("system", "prompt"):
            pieces.append(Piece("words", [special["bos"]]))
        has_question = any(segment.role == "question" for segment in segments)  # then that alone is asked
        for segment in segments:
            if segment.role == "system":
                continue  # stands in the prompt's wording
            if not has_question:
                pieces += self.cue(segment.role)
            if segment.kind == "text":
                pieces.append(Piece("words", self.ids(segment, segments), learnt=segment.loss))
                continue
            begin, end = Piece("words", [special["boi"]]), Piece("words", [special["eoi"]])
            if segment.loss or GENERATION in segment.seen_by:
                codes = segment.drawn_as if segment.loss else None  # what follows has seen the image, not its codes
                pieces += [begin, Piece("drawn", image=segment.image, codes=codes, learnt=segment.loss), end]
            if UNDERSTANDING in segment.seen_by:
                pieces += [begin, Piece("seen", image=segment.image), end]
        if opening is not None:
            pieces += self.cue(opening)
        if opening in ("draw", "redraw"):
            pieces.append(Piece("words", [special["boi"]]))
        return [piece for piece in pieces if piece.ids or piece.image is not None or piece.learnt]

    def cue(self, role: str) -> list[Piece]:
        """What is asked in front of a segment of this role: one piece, or none."""
        cue = self.cues.get(role)
        return [Piece("words", self.ids_of(f"\n\n<|User|>: {cue}\n\n<|Assistant|>:"))] if cue else []

    def ids(self, segment: Segment, segments: Sequence[Segment]) -> list[int]:
        """The tokens of a text in its wording; of one that the model wrote, those that it wrote."""
        if segment.drawn_as is not None:
            return segment.drawn_as
        text = self.janus.as_text(segment.text)
        if segment.role == "prompt":
            system = next((other.text for other in segments if other.role == "system"), None)
            chat = self.janus.chat if system is None else Chat(self.janus.as_text(system), "{prompt}")
            return self.janus.ids_of(chat.plan(text))
        return self.ids_of(f"\n\n<|User|>: {text}\n\n<|Assistant|>:" if segment.role == "question" else text)

    def ids_of(self, text: str) -> list[int]:
        """The tokens of a part of a conversation, with nothing in front."""
        return ids_of(self.janus.tokenizer, text)
