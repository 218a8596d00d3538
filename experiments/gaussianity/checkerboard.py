"""The checkerboard toy: a latent of +-1 squares, and each regulariser alone to turn it into noise.

    python experiments/gaussianity/checkerboard.py            # about two minutes on a CPU

It writes checkerboard.md, checkerboard.png and checkerboard.gif. Every regulariser takes the same
normalised steps from the same start: rms 0.3 falling to 0, so that only the direction of its
gradient counts; a zero gradient is no step. The control, white_noise, is MPGR with white noise in
place of the spectrum's gradient. A figure within its band is one that 99 % of true noise has.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from t2i_rl.command import cli
from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.report.grid import caption_grid
from t2i_rl.gaussianity.health import GaussianityReport

matplotlib.use("Agg")

HERE = Path(__file__).parent
SHAPE = (16, 64, 64)
ARMS = ("kl", "reno", "kurtosis", "prno", "mpgr", "mpgr_natural", "gper", "white_noise")
LONG = {"kl": 10_000, "reno": 10_000, "kurtosis": 10_000}  # iterations that the paper gives them
PUBLISHED = {  # seconds and verdict, MPGR's table
    "kl": "11.2 s, remains",
    "reno": "10.4 s, remains",
    "kurtosis": "16.1 s, remains",
    "prno": "14.1 s, residue",
    "mpgr": "0.26 s, clean",
}
SHOWN = ("kl", "prno", "mpgr", "mpgr_natural", "white_noise")
FIGURES = ("std", "kurtosis", "ks", "lag1_x", "max_power", "spectrum")


def checkerboard(square: int) -> torch.Tensor:
    """One latent `(1, 16, 64, 64)` of +-1 in squares of so many pixels."""
    rows, columns = torch.meshgrid(torch.arange(64) // square, torch.arange(64) // square, indexing="ij")
    return (1.0 - 2.0 * ((rows + columns) % 2)).expand(1, *SHAPE).clone()


def regularizer(name: str):
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return instantiate(compose("config", ["method=noise_opt", f"regularizer={name}"]).regularizer)


def run(name: str, start: torch.Tensor, steps: int, first_rms: float = 0.3, seed: int = 0, frames: int = 0) -> dict:
    """`steps` normalised steps; the latent at the end, seconds, and `frames` latents on the way."""
    x, generators = start.clone(), [torch.Generator().manual_seed(seed)]
    made = regularizer(name)
    kept = [x.clone()]
    began = time.perf_counter()
    for step in range(steps):
        rms = first_rms * (1 - step / steps)
        if made.terms:
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(made(leaf, generators)[0].sum(), leaf)
        else:
            gradient = torch.zeros_like(x)
        size = gradient.square().mean().sqrt()
        if size > 0:
            x = x - rms * gradient / size
        if made.constraint is not None:
            x = made.constraint(x, start)
        if frames and (step + 1) % max(1, steps // frames) == 0:
            kept.append(x.clone())
    return {"x": x, "seconds": time.perf_counter() - began, "frames": kept}


def picture(x: torch.Tensor) -> np.ndarray:
    """The first channel as grey, -3 to 3."""
    grey = ((x[0, 0].clamp(-3, 3) + 3) / 6 * 255).round().to(torch.uint8).numpy()
    return np.repeat(grey[..., None], 3, axis=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--long",
        type=float,
        default=1.0,
        help="share of the 10,000 iterations that the paper gives KL, norm and kurtosis",
    )
    options = parser.parse_args()
    bands = GaussianityReport.of(torch.randn(1, *SHAPE)).bands
    command = f"python experiments/gaussianity/checkerboard.py --steps {options.steps} --seeds {options.seeds}"
    about = (
        f"`{command}`, {torch.get_num_threads()} CPU threads, D = {torch.Size(SHAPE).numel():,}. "
        "Mean over seeds [least, greatest]; **bold**: every seed within the band of true noise. "
        "*Published*: what MPGR's authors report of as many iterations (arXiv 2509.07027), on their machine."
    )
    band_cells = [f"{bands[name][0]:.3g} to {bands[name][1]:.3g}" for name in FIGURES]
    lines = [
        "# The checkerboard toy",
        "",
        about,
        "",
        f"| start | regulariser | published | steps | seconds | cosine to start | {' | '.join(FIGURES)} |",
        "|---" * (6 + len(FIGURES)) + "|",
        f"| | *true noise* | | | | | {' | '.join(band_cells)} |",
    ]
    for square in (1, 8):
        start = checkerboard(square)
        before = GaussianityReport.of(start).figures
        start_cells = [f"{float(before[name]):.3g}" for name in FIGURES]
        lines.append(f"| {square} px | *none* | | 0 | | 1.000 | {' | '.join(start_cells)} |")
        for name in ARMS:
            steps = int(LONG[name] * options.long) if name in LONG else options.steps
            runs = [run(name, start, steps, seed=seed) for seed in range(1 if name in LONG else options.seeds)]
            cosines = [float(torch.cosine_similarity(each["x"].flatten(), start.flatten(), dim=0)) for each in runs]
            figures = [GaussianityReport.of(each["x"]).figures for each in runs]
            cells = [cell([float(each[figure]) for each in figures], bands[figure]) for figure in FIGURES]
            seconds, cosine = np.mean([each["seconds"] for each in runs]), np.mean(cosines)
            of_run = f"{square} px | {name} | {PUBLISHED.get(name, '')} | {steps} | {seconds:.2f} | {cosine:.3f}"
            lines.append(f"| {of_run} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    write_atomic(HERE / "checkerboard.md", "\n".join([*lines, ""]))
    draw(options.steps)


def cell(values: list[float], band: tuple[float, float]) -> str:
    text = f"{np.mean(values):.3g}" + (f" [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else "")
    return f"**{text}**" if all(band[0] <= value <= band[1] for value in values) else text


def draw(steps: int) -> None:
    """A strip and an animation of the first channel, one row or panel a regulariser."""
    tracks = {name: run(name, checkerboard(8), steps, frames=20)["frames"] for name in SHOWN}
    places = (0, 2, 5, 10, 15, 20)
    images = [picture(tracks[name][place]) for name in SHOWN for place in places]
    captions = [f"{name}, step {place * steps // 20}" for name in SHOWN for place in places]
    caption_grid(images, captions, len(places), 2).save(HERE / "checkerboard.png")
    moving = [
        caption_grid([picture(tracks[name][place]) for name in SHOWN], list(SHOWN), len(SHOWN), 3).quantize(64)
        for place in range(21)
    ]
    moving[0].save(
        HERE / "checkerboard.gif", save_all=True, append_images=[*moving[1:], *[moving[-1]] * 10], duration=150, loop=0
    )
    print(f"wrote {HERE / 'checkerboard.md'}, .png and .gif; {Image.open(HERE / 'checkerboard.gif').n_frames} frames")


if __name__ == "__main__":
    main()
