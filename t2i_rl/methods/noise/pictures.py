"""What a noise search looks like: a strip a case, and the target against held-out judges."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from safetensors.torch import load_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from t2i_rl.core.files import read_object, replacing
from t2i_rl.core.pixels import read_image
from t2i_rl.evaluation.stats import t_quantile


def radial_power(noise: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of the channels' 2-D spectra by spatial frequency, in cycles a latent pixel: 1 everywhere for white
    noise."""
    power = torch.fft.fft2(noise.float(), norm="ortho").abs().square().flatten(0, -3).mean(0)
    fy, fx = (torch.fft.fftfreq(size) for size in power.shape)
    radius = (fy[:, None].square() + fx[None].square()).sqrt()
    edges = torch.linspace(0, float(radius.max()) + 1e-6, min(12, min(power.shape)) + 1)
    ring = torch.bucketize(radius, edges[1:-1])
    count = torch.bincount(ring.flatten(), minlength=len(edges) - 1)
    total = torch.bincount(ring.flatten(), power.flatten(), minlength=len(edges) - 1)
    filled = count > 0
    return ((edges[1:] + edges[:-1]) / 2)[filled].numpy(), (total[filled] / count[filled]).numpy()


def strip(place: Path, path: Path, most: int = 8) -> None:
    """One case: pictures on the way and the best, and below each the power spectrum and the histogram of its noise."""
    case, noises = read_object(place / "case.json", "initial", "best", "prompt"), load_file(place / "noise.safetensors")
    steps = sorted(int(name.removeprefix("step_")) for name in noises if name.startswith("step_"))
    steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(most - 1, len(steps))).round().astype(int))]
    columns = [(f"step {step}", f"step_{step:04d}", f"step_{step:04d}.png") for step in steps]
    columns += [(f"best, step {case['best']['step']}", "best", "best.png")]
    figure, axes = plt.subplots(
        3, len(columns), figsize=(1.7 * len(columns), 5), constrained_layout=True, squeeze=False
    )
    grid = np.linspace(-4, 4, 200)
    for (title, name, image), (drawn, spectrum, values) in zip(columns, axes.T, strict=True):
        drawn.imshow(np.asarray(read_image(place / "images" / image)), interpolation="nearest")
        drawn.set_axis_off()
        drawn.set_title(title, fontsize=9)
        spectrum.plot(*radial_power(noises[name]))
        spectrum.axhline(1, color="grey", linewidth=0.8)
        spectrum.set_ylim(0, 4)
        values.hist(noises[name].flatten().numpy(), bins=40, range=(-4, 4), density=True, alpha=0.6)
        values.plot(grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color="grey", linewidth=0.8)
        values.set_ylim(0, 0.7)
    for axis, label in zip(axes[:, 0], ("", "power by frequency", "values"), strict=True):
        axis.set_ylabel(label, fontsize=8)
    for axis in axes[1:].flat:
        axis.tick_params(labelsize=6)
    gained = f"target {case['initial']['target']:.3g} -> {case['best']['target']:.3g}"
    letters = max(24, 22 * len(columns))  # what the figure's width holds at this size of letter
    prompt = textwrap.shorten(case["prompt"], 4 * letters, placeholder=" ...")
    title = "\n".join([*textwrap.wrap(prompt, letters), gained])
    figure.suptitle(title, fontsize=10, parse_math=False)  # a prompt may hold $
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)


def curves_of(
    trajectories: Sequence[Sequence[dict]], name: str, prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps at which every case was measured, mean `(S,)` and half of Student's 95 % interval over prompts `(S,)`, NaN
    for fewer than three.

    A case that stopped keeps its last value.
    """
    steps = sorted({row["step"] for rows in trajectories for row in rows if name in row})
    table = np.empty((len(trajectories), len(steps)))
    for case, rows in enumerate(trajectories):
        known = {row["step"]: row[name] for row in rows if name in row}
        value = float("nan")
        for column, step in enumerate(steps):
            value = known.get(step, value)
            table[case, column] = value
    table = np.stack([table[np.array(prompts) == prompt].mean(axis=0) for prompt in dict.fromkeys(prompts)])
    if len(table) < 3:
        return np.array(steps), table.mean(axis=0), np.full(len(steps), np.nan)
    half = t_quantile(len(table) - 1) * table.std(axis=0, ddof=1) / len(table) ** 0.5
    return np.array(steps), table.mean(axis=0), half


def hacking_figure(
    trajectories: Sequence[Sequence[dict]], path: Path, watched: Sequence[str], prompts: Sequence[str], title: str = ""
) -> None:
    """The target against each held-out judge by step.

    A judge's plot is shaded from where the judge was best, if it fell since by more than its
    interval while the target rose.
    """
    judges: list[str | None] = list(watched) or [None]
    figure, axes = plt.subplots(1, len(judges), figsize=(5 * len(judges), 3.6), constrained_layout=True, squeeze=False)
    steps, target, half = curves_of(trajectories, "target", prompts)
    for axis, name in zip(axes.flat, judges, strict=True):
        axis.plot(steps, target, color="C0", label="target")
        axis.fill_between(steps, target - half, target + half, color="C0", alpha=0.2)
        axis.set(xlabel="step", ylabel="target", title=title or "")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name is None:
            continue
        other = axis.twinx()
        held_steps, held, held_half = curves_of(trajectories, f"watch/{name}", prompts)
        other.plot(held_steps, held, color="C1", marker=".", label=f"{name} (held out)")
        other.fill_between(held_steps, held - held_half, held + held_half, color="C1", alpha=0.2)
        other.set_ylabel(f"{name} (held out)")
        peak = int(held.argmax())
        rose = target[-1] > target[steps == held_steps[peak]][0]
        if held[peak] - held[-1] > held_half[-1] and rose:
            axis.axvspan(held_steps[peak], held_steps[-1], color="red", alpha=0.08, label="target up, held out down")
        lines = [line for side in (axis, other) for line in zip(*side.get_legend_handles_labels(), strict=True)]
        axis.legend(*zip(*lines, strict=True), fontsize=8)
    figure.suptitle(f"mean over {len(trajectories)} cases, 95 % intervals over prompts", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)
