"""IRG's ladder as pictures, from finished jobs: levels and curves, and a strip of drawings."""

from pathlib import Path

import matplotlib
import numpy as np
from arms import ARMS, FIRST_STAGE, SEEDS, TOLD, done, study
from controls import records
from PIL import Image
from report import overall
from rows import I1, I2, LADDER

from t2i_rl.evaluation.records import image_path, read_stage
from t2i_rl.evaluation.report.grid import FRAME, RIGHT, WRONG, caption_grid, first_of_each_task
from t2i_rl.study.report import save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LOSSES = ("text/loss", "image/loss")
VALIDATED = ("val/turn1", "val/turn2", "val/names_defect", "val/false_alarms")


def write_figure() -> None:
    """Levels of the ladder, and what the validation prompts showed while training."""
    figure, axes = plt.subplots(1, 3, figsize=(19, 6), width_ratios=(1, 1.2, 1.2), constrained_layout=True)
    draw_levels(axes[0])
    draw_curves(axes[1], LOSSES, 20, "cross-entropy, nats a token (means of 20 steps)")
    draw_curves(axes[2], VALIDATED, 1, "validation prompts while training")
    save_figure(figure, HERE / "figure.png")


def draw_levels(axis) -> None:
    rows = [row for row in reversed(LADDER) if done(row[1])]
    colors = plt.get_cmap("tab20").colors
    for height, (_, arm, stage) in enumerate(rows):
        levels = [100 * overall(drawn) for drawn in records(arm, stage)]
        color = colors[[*ARMS, *TOLD].index(arm) % len(colors)]
        axis.plot(levels, [height] * len(levels), "o", color=color, alpha=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    axis.set(title="strict accuracy, a dot a seed", xlabel="percent", xlim=(0, 100))
    axis.grid(axis="x", alpha=0.3)


def draw_curves(axis, names: tuple[str, ...], width: int, title: str) -> None:
    """Means over seeds and over `width` steps; stage 2 goes on where stage 1 ended."""
    for arm, style in (("trajectories", "--"), ("stage1", ":"), ("six", "-")):
        for number, name in enumerate(names if done(arm) else ()):
            curves = [study.logged(arm, seed, name) for seed in SEEDS]
            steps = curves[0][0] + (FIRST_STAGE if arm == "six" else 0)
            window = min(width, len(steps))
            mean = np.convolve(
                np.mean([values for _, values in curves], axis=0), np.ones(window) / window, mode="valid"
            )
            axis.plot(steps[window - 1 :], mean, style, color=f"C{number}", label=f"{arm}: {name}")
    axis.set(title=title, xlabel="step")
    axis.legend(fontsize=6)


def write_strips() -> None:
    """The first two test prompts of each task, chosen without looking: I1 and I2, and what was thought before them."""
    run = study.run_folder("six", SEEDS[0])
    first, second = (read_stage(run, stage) for stage in (I1, I2))
    images, captions, frames = [], [], []
    for key in first_of_each_task(list(first.values()), 2):
        prompt = first[key]["prompt"]
        for caption, stage, row in ((f"I1: {prompt}", I1, first[key]), ("I2", I2, second[key])):
            images.append(np.asarray(Image.open(image_path(run, stage, row)).convert("RGB")))
            captions.append(f"{caption}\n{row['plan']}")
            frames.append({True: RIGHT, False: WRONG}.get(row["strict"], FRAME))
    caption_grid(images, captions, 4, 6, frames).save(HERE / "strips.png")
    print(f"wrote {HERE / 'strips.png'}")
