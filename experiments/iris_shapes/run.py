"""The sign experiment of IRIS on the embedded world: six rewards, three seeds, equal steps, one command.

    python experiments/iris_shapes/run.py            # all jobs (those already finished are kept), then table.md and figure.png
    python experiments/iris_shapes/run.py --only-table

Jobs live in outputs/iris_shapes/<reward>/seed_<n>; two run side by side, each on one thread.
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np

from t2i_rl.evaluation.diversity import diversity_by_prompt
from t2i_rl.evaluation.results import read_results, read_stage, write_atomic
from t2i_rl.evaluation.stats import compare_over_seeds, seed_interval
from t2i_rl.evaluation.tables import excludes_zero

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
REWARDS = ("nsc", "sc", "entropy", "oracle", "random", "length")
SEEDS = (0, 1, 2)
OUTPUTS = ROOT / "outputs" / "iris_shapes"
TASKS = (
    "overall",
    "task/single_object",
    "task/two_object",
    "task/counting",
    "task/colors",
    "task/position",
    "task/color_attr",
    "held_out",
)
LOGGED = (
    "text/plan_length",
    "text/self_certainty",
    "image/self_certainty",
    "image/codes_used",
    "train/kl",
    "watch/oracle",
)


def folder(reward: str, seed: int) -> Path:
    return OUTPUTS / reward / f"seed_{seed}"


def run_job(job: tuple[str, int]) -> None:
    """One training run in its own process, resumed where a killed one stopped; its output goes to job.log."""
    reward, seed = job
    out = folder(reward, seed)
    if (out / "results.json").exists():
        print(f"{reward} seed {seed}: done before", flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "run.py",
        "experiment=iris_shapes",
        f"reward={reward}",
        f"seed={seed}",
        f"hydra.run.dir={out}",
    ]
    if (out / "checkpoints" / "last.ckpt").exists():
        command.append("ckpt_path=last")
    with (out / "job.log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{reward} seed {seed} failed with exit code {done.returncode}: see {out / 'job.log'}")
    print(f"{reward} seed {seed}: done", flush=True)


def column(reward: str, seed: int, name: str) -> np.ndarray:
    """One logged metric by step."""
    path = next(folder(reward, seed).rglob("metrics.csv"))
    with path.open() as rows:
        return np.array([float(row[name]) for row in csv.DictReader(rows) if row.get(name)])


def cell(values: dict, points: bool = True) -> str:
    """`+3.1 [+1.0, +5.2]`, bold where the interval excludes zero."""
    scale = 100 if points else 1
    digits = 1 if points else 3
    text = f"{scale * values['difference']:+.{digits}f} [{scale * values['low']:+.{digits}f}, {scale * values['high']:+.{digits}f}]"
    return f"**{text}**" if excludes_zero(values) else text


def effects() -> tuple[dict, dict]:
    """Paired differences, trained minus base and trained minus the random control, for every reward."""
    base = {
        seed: {reward: list(read_stage(folder(reward, seed), "base_plan").values()) for reward in REWARDS}
        for seed in SEEDS
    }
    trained = {
        seed: {reward: list(read_stage(folder(reward, seed), "trained_plan").values()) for reward in REWARDS}
        for seed in SEEDS
    }
    against_base = {
        reward: compare_over_seeds([(base[seed][reward], trained[seed][reward]) for seed in SEEDS])
        for reward in REWARDS
    }
    against_random = {
        reward: compare_over_seeds([(trained[seed]["random"], trained[seed][reward]) for seed in SEEDS])
        for reward in REWARDS
        if reward != "random"
    }
    return against_base, against_random


def diversity_change(reward: str) -> dict:
    """Change of the within-prompt spread, mean over prompts, with Student's interval over seeds."""
    changes = []
    for seed in SEEDS:
        ids = [record["prompt_id"] for record in read_stage(folder(reward, seed), "base_plan").values()]
        spread = [
            diversity_by_prompt(np.load(folder(reward, seed) / "evaluation" / stage / "features.npy"), ids)[
                "diversity"
            ].mean()
            for stage in ("base_plan", "trained_plan")
        ]
        changes.append(spread[1] - spread[0])
    over = seed_interval(changes)
    return {"difference": over["mean"], "low": over["low"], "high": over["high"]}


def logged_change(reward: str, name: str) -> dict:
    """Mean of the last five rollouts minus mean of the first five, with Student's interval over seeds."""
    series = [column(reward, seed, name) for seed in SEEDS]
    over = seed_interval([float(values[-5:].mean() - values[:5].mean()) for values in series])
    return {"difference": over["mean"], "low": over["low"], "high": over["high"]}


def write_table() -> None:
    results = read_results(folder("nsc", 0) / "results.json")
    base = results["stages"]["base_plan"]["metrics"]
    against_base, against_random = effects()
    short = [name.removeprefix("task/") for name in TASKS]
    lines = [
        "# The sign experiment: what each reward does to janus_tiny on `shapes`",
        "",
        f"`python experiments/iris_shapes/run.py`: {len(REWARDS)} rewards x {len(SEEDS)} seeds ({', '.join(map(str, SEEDS))}), "
        f"{results['steps']} optimizer steps each, {results['benchmark']['n_prompts']} held-out prompts x "
        f"{results['benchmark']['samples_per_prompt']} images per stage.",
        "Differences in points of strict accuracy with a plan; 95 % intervals by a two-level bootstrap (seeds, then prompts); bold: excludes zero.",
        f"Base with a plan, seed 0: {100 * base['overall']['mean']:.1f} % [{100 * base['overall']['low']:.1f}, {100 * base['overall']['high']:.1f}].",
        "",
        "## Trained minus base",
        "",
        "| reward | " + " | ".join(short) + " |",
        "|---" * (len(TASKS) + 1) + "|",
        *(
            f"| {reward} | " + " | ".join(cell(against_base[reward][name]) for name in TASKS) + " |"
            for reward in REWARDS
        ),
        "",
        "## Trained minus the random control (same seeds, same prompts)",
        "",
        "| reward | " + " | ".join(short) + " |",
        "|---" * (len(TASKS) + 1) + "|",
        *(
            f"| {reward} | " + " | ".join(cell(row[name]) for name in TASKS) + " |"
            for reward, row in against_random.items()
        ),
        "",
        "## What moves inside",
        "",
        "Last five rollouts minus first five (Student's 95 % interval over seeds); diversity and malformed from the evaluation.",
        "",
        "| reward | " + " | ".join(LOGGED) + " | diversity | malformed (points) |",
        "|---" * (len(LOGGED) + 3) + "|",
        *(
            f"| {reward} | "
            + " | ".join(cell(logged_change(reward, name), points=False) for name in LOGGED)
            + f" | {cell(diversity_change(reward), points=False)} | {cell(against_base[reward]['malformed'])} |"
            for reward in REWARDS
        ),
        "",
    ]
    write_atomic(HERE / "table.md", "\n".join(lines))
    print(f"wrote {HERE / 'table.md'}")


def write_figure() -> None:
    panels = (
        "watch/oracle",
        "reward/plan_length_correlation",
        "text/plan_length",
        "text/self_certainty",
        "image/self_certainty",
        "train/kl",
    )
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    for axis, name in zip(axes.flat, panels, strict=True):
        for reward in REWARDS:
            series = np.stack([column(reward, seed, name) for seed in SEEDS])
            kernel = np.ones(5) / 5
            smooth = np.stack([np.convolve(row, kernel, mode="valid") for row in series])
            axis.plot(smooth.mean(axis=0), label=reward)
            axis.fill_between(range(smooth.shape[1]), smooth.min(axis=0), smooth.max(axis=0), alpha=0.15)
        axis.set_title(name)
        axis.set_xlabel("step (mean of 5; band: least and most over seeds)")
    axes.flat[0].legend()
    figure.savefig(HERE / "figure.png", dpi=110)
    print(f"wrote {HERE / 'figure.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild table and figure from finished jobs")
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side, one thread each")
    options = parser.parse_args()
    if not options.only_table:
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(run_job, [(reward, seed) for seed in SEEDS for reward in REWARDS]))
    write_table()
    write_figure()
