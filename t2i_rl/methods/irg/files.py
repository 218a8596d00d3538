"""A drawn trajectory on disk: trajectory.json, a PNG a turn, and the strip."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.core.pixels import read_image
from t2i_rl.evaluation.records import require
from t2i_rl.methods.irg.strips import strips
from t2i_rl.methods.irg.toy_format import png
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.models.autoregressive.segments import Segment

KEYS = ("role", "text", "image", "loss", "seen_by")


def save_trajectory(folder: Path, trajectory: Trajectory) -> None:
    """Write `trajectory.json`, `turn<k>.png` and `strip.png`; the JSON last, so that it stands for all."""
    folder, segments, turn = Path(folder), [], 0
    for segment in trajectory.segments:
        name = None
        if segment.image is not None:
            turn += 1
            name = f"turn{turn}.png"
            write_atomic(folder / name, png(segment.image))
        about = {"role": segment.role, "text": segment.text, "image": name, "loss": segment.loss}
        segments.append({**about, "seen_by": sorted(segment.seen_by)})
    if turn:
        write_atomic(folder / "strip.png", png(np.asarray(strips([trajectory]))))
    rest = {field.name: getattr(trajectory, field.name) for field in fields(trajectory) if field.name != "segments"}
    write_atomic(folder / "trajectory.json", json.dumps({"segments": segments, **rest}, indent=1, ensure_ascii=False))


def load_trajectory(folder: Path) -> Trajectory:
    """The trajectory that `save_trajectory` wrote.

    Raises:
        UserError: a file is missing or broken; it is named.
    """
    path = Path(folder) / "trajectory.json"
    content = read_json(path)
    require(content, [field.name for field in fields(Trajectory)], str(path))
    unknown = set(content) - {field.name for field in fields(Trajectory)}
    if unknown or not isinstance(content["segments"], list):
        raise UserError(
            f"{path}: not what a trajectory is written as: {', '.join(sorted(unknown)) or 'segments is no list'}"
        )
    segments = []
    for number, row in enumerate(content.pop("segments")):
        require(row, KEYS, f"{path}: segment {number}")
        if (
            not isinstance(row["text"], str | None)
            or not isinstance(row["image"], str | None)
            or not isinstance(row["seen_by"], list)
        ):
            raise UserError(
                f"{path}: segment {number}: text, image and seen_by must be a text, a file's name and a list"
            )
        image = None
        if row["image"] is not None:
            image = np.asarray(read_image(path.parent / row["image"], f"{path}: segment {number}: {row['image']}"))
        segments.append(Segment(row["role"], row["text"], image, row["loss"], frozenset(row["seen_by"])))
    return Trajectory(tuple(segments), **content)
