"""One prompt's material as a row of each mode (docs/irg.md)."""

from dataclasses import dataclass

import numpy as np

from t2i_rl.core.prompts import Prompt
from t2i_rl.methods.irg.trajectory import MODES
from t2i_rl.models.autoregressive.segments import BOTH, Segment


@dataclass(frozen=True)
class Material:
    """Of one prompt: a thought and a good picture that agree; the base's own thought and weak picture; the reflection
    on it, and the better picture. A text is None where its writer was cut; no row of it is kept."""

    prompt: Prompt
    thought: str | None
    good: np.ndarray
    base_thought: str | None
    weak: np.ndarray
    reflection: str | None
    better: np.ndarray


def row_of(mode: str, material: Material, questions: dict[str, str]) -> tuple[Segment, ...]:
    """The segments of `mode`, losses and encoders as it has them."""
    improving = mode.startswith("improving")
    texts = {
        "prompt": material.prompt.text,
        "think": material.base_thought if improving else material.thought,
        "question": questions["reflect" if improving else "think"],
        "reflect": material.reflection,
    }
    images = {"draw": material.weak if improving else material.good, "redraw": material.better}
    return tuple(
        Segment(part.role, text=texts[part.role], loss=part.loss)
        if part.kind == "text"
        else Segment(part.role, image=images[part.role], loss=part.loss, seen_by=frozenset() if part.loss else BOTH)
        for part in MODES[mode]
    )
