"""One picture to be improved, its way there, and its files."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from t2i_rl.core.files import write_atomic
from t2i_rl.core.pixels import write_png
from t2i_rl.core.prompts import Prompt


@dataclass(frozen=True)
class Case:
    """One picture to be improved: `place` in the whole list, its prompt, which sample of it, and the seed of its first
    noise."""

    place: int
    prompt: Prompt
    sample: int
    seed: int


@dataclass
class Track:
    """One case on its way.

    rows: a row for every step measured. noises: the first, the best, the last and some between, by name. images: the
    pictures of those, by step or name. ends: what was measured at the best and the last noise. stopped: why it ended
    early.
    """

    case: Case
    rows: list[dict] = field(default_factory=list)
    noises: dict[str, torch.Tensor] = field(default_factory=dict)
    images: dict[int | str, np.ndarray] = field(default_factory=dict)
    ends: dict[str, dict] = field(default_factory=dict)
    best_step: int = 0
    stopped: str | None = None

    @property
    def best(self) -> float:
        """The target where it was best."""
        return self.rows[self.best_step]["target"]


def write_case(folder: Path, track: Track, fingerprint: str) -> None:
    """A case's pictures, noises and trajectory; `case.json` last, so that half a case is no case."""
    shutil.rmtree(folder, ignore_errors=True)  # half done
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for step, image in track.images.items():
        name = step if isinstance(step, str) else f"step_{step:04d}"
        write_png(folder / "images" / f"{name}.png", image)
    write_atomic(folder / "noise.safetensors", save({name: noise.clone() for name, noise in track.noises.items()}))
    write_atomic(folder / "trajectory.jsonl", "".join(json.dumps(row) + "\n" for row in track.rows))
    facts = {
        "prompt_id": track.case.prompt.id,
        "prompt": track.case.prompt.text,
        "tag": track.case.prompt.tag,
        "sample_index": track.case.sample,
        "seed": track.case.seed,
        "initial": track.rows[0],
        **track.ends,
        "stopped": track.stopped,
        "fingerprint": fingerprint,
    }
    write_atomic(folder / "case.json", json.dumps(facts, indent=1))
