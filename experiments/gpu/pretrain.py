"""Item `pretrain`: the tiny models, trained on from the weights that ship, rows rendered by the other cores.

What comes back is a candidate: it is measured at home with task=evaluate before it takes the place of any weights.
"""

import csv
import os
import statistics
import tarfile
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from hydra import compose, initialize_config_dir

from experiments.gpu.record import Measured
from experiments.gpu.terms import OutOfTime, Terms
from t2i_rl.command import cli
from t2i_rl.core.files import replacing
from t2i_rl.tasks.pretrain import train

MOST = 16 * 2**20  # bytes of one file that comes back
STAGES = {  # the one whose loss the table shows: its column in metrics.csv
    "janus_tiny": ("lm", "image_nll"),
    "sd_tiny": ("denoiser", "error"),
    "sd3_tiny": ("denoiser", "error"),
    "flux_tiny": ("one_step", "error"),
}


@dataclass(frozen=True)
class Sizes:
    """How long each model is trained, and with which settings.

    Args:
        minutes: at most, and least, below which a model waits for another lease.
        spare: seconds for loading and writing one.
        recipes: settings below task.recipes.<model>, by model.
    """

    minutes: float
    least: float
    spare: float
    recipes: dict[str, tuple[str, ...]]


# Four times the shipped recipe's batches: a GPU takes them in little more time.
LARGE = ("denoiser.batch_size=256",)
SMALL = ("denoiser.batch_size=4",)
SIZES = {
    "real": Sizes(
        minutes=3.0,
        least=1.5,
        spare=30.0,
        recipes={
            "janus_tiny": (
                "lm.rows.sizes={draw:256,plan:128,look:48}",
                "habits.rows.sizes={draw:128,plan:256}",
                "look.rows.sizes={look:256}",
            ),
            "sd_tiny": LARGE,
            "sd3_tiny": LARGE,
            "flux_tiny": (*LARGE, "one_step.teacher.batches=64"),
        },
    ),
    "tiny": Sizes(
        minutes=0.2,
        least=0.05,
        spare=5.0,
        recipes={
            "janus_tiny": (
                "lm.rows.sizes={draw:4,plan:4,look:2}",
                "habits.rows.sizes={draw:4,plan:4}",
                "look.rows.sizes={look:4}",
            ),
            "sd_tiny": SMALL,
            "sd3_tiny": SMALL,
            "flux_tiny": (
                *SMALL,
                "one_step.teacher.batches=2",
                "one_step.teacher.batch_size=4",
                "one_step.teacher.steps=2",
            ),
        },
    ),
}


def run(measured: Measured, terms: Terms) -> None:
    """Raises:
    OutOfTime: not every model has had its minutes.
    """
    sizes, end = SIZES[terms.sizes], time.monotonic() + terms.seconds
    seed = date.today().toordinal()  # of another day: other rows
    for model in STAGES:
        if model in measured.values:
            continue
        minutes = min(sizes.minutes, (end - time.monotonic() - sizes.spare) / 60)
        if minutes < sizes.least:
            raise OutOfTime(f"{model} would have {max(minutes, 0):.1f} minutes, and takes {sizes.least} at least")
        recipes = [f"task.recipes.{model}.{setting}" for setting in sizes.recipes[model]]
        with tempfile.TemporaryDirectory() as folder:
            facts = _train_on(model, Path(folder), seed, minutes, recipes)
            archive = terms.out / f"{model}.tar.gz"
            with replacing(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
                tar.add(Path(folder) / model, arcname=".")
        if archive.stat().st_size > MOST:
            raise RuntimeError(f"{archive} has {archive.stat().st_size} bytes; {MOST} come back")
        measured.keep(model, facts | {"file": archive.name, "bytes": archive.stat().st_size})


def _train_on(model: str, folder: Path, seed: int, minutes: float, recipes: list[str]) -> dict:
    """Train a shipped model on into `folder`; what the table says of it."""
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        weights = compose("config", [f"model={model}"]).model.path
        workers = max(1, (os.cpu_count() or 2) - 2)
        given = {"initial_weights": weights, "minutes": minutes, "workers": workers}
        settings = [f"task.{name}={value}" for name, value in given.items()]
        names = ["task=pretrain", f"model={model}", f"seed={seed}", f"paths.output_dir={folder}"]
        cfg = compose("config", [*names, *settings, *recipes])
    _, spent = train(cfg)
    stage, column = STAGES[model]
    log = folder / stage / "metrics.csv"  # has a row every tenth batch; there is none before the first of them
    losses = [float(row[column]) for row in csv.DictReader(log.open())] if log.exists() else []
    ends = max(1, len(losses) // 10)
    return {
        "minutes": spent,
        "seed": seed,
        "workers": workers,
        "settings": recipes,
        "batches": 10 * len(losses),
        "loss": f"{stage}'s {column}",
        "first": statistics.mean(losses[:ends]) if losses else None,
        "last": statistics.mean(losses[-ends:]) if losses else None,
    }


def table(measured: Measured) -> str:
    lines = [
        "From the weights that ship, the autoencoder as it is. Losses: means of the first and of the last tenth of one "
        "stage's training, on other rows each. A candidate, to be measured at home with task=evaluate.",
        "",
        "| model | minutes | seed | settings | batches | loss | first | last | file |",
        "|---|--:|--:|---|--:|---|--:|--:|---|",
    ]
    for model, facts in measured.values.items():
        settings = " ".join(setting.removeprefix(f"task.recipes.{model}.") for setting in facts["settings"])
        losses = ["-" if facts[end] is None else f"{facts[end]:.4f}" for end in ("first", "last")]
        cells = [model, f"{facts['minutes']:.1f}", facts["seed"], f"`{settings}`", facts["batches"], facts["loss"]]
        cells += [*losses, f"{facts['file']}, {facts['bytes'] / 2**20:.1f} MiB"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
