"""Trajectories as pictures: a row a prompt, each turn's picture over what was thought before it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from t2i_rl.evaluation.report.grid import FRAME, RIGHT, WRONG, caption_grid
from t2i_rl.evaluation.report.thumbnails import PICTURE, shrunk
from t2i_rl.methods.irg.trajectory import Trajectory


def strips(trajectories: Sequence[Trajectory], verdicts: Sequence[Sequence[bool]] | None = None) -> Image.Image:
    """One picture `(prompt, R1, I1, R2, I2, ...)` a trajectory; a turn that was not drawn is left white.

    Args:
        verdicts: of each picture, for its frame.
    """
    turns = max(len(trajectory.images) for trajectory in trajectories)
    blank = np.full_like(trajectories[0].images[0], 255)
    images, captions, frames = [], [], []
    for row, trajectory in enumerate(trajectories):
        prompt = next(segment.text for segment in trajectory.segments if segment.role == "prompt")
        for turn in range(turns):
            drawn = turn < len(trajectory.images)
            text = trajectory.texts[turn] if turn < len(trajectory.texts) else ""
            image = Image.fromarray(trajectory.images[turn] if drawn else blank)
            images.append(np.asarray(shrunk(image, PICTURE.side)))
            captions.append(f"{prompt}\n{text}" if turn == 0 else text)
            verdict = verdicts[row][turn] if verdicts is not None and drawn else None
            frames.append({None: FRAME, True: RIGHT, False: WRONG}[verdict])
    return caption_grid(images, captions, turns, max(1, 192 // blank.shape[0]), frames)
