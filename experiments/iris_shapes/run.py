"""The sign experiment of IRIS (arXiv 2509.25562 section 4) at the scale of `shapes`: six rewards, three seeds, equal steps;
the intrinsic rewards and the control once more at a gentler learning rate, NSC on image tokens too, and NSC as IRIS's released code has it.

    python experiments/iris_shapes/run.py                 # everything that is not done yet, then table.md and figure.png
    python experiments/iris_shapes/run.py --only-table
    python experiments/iris_shapes/run.py --arms "nsc released" "nsc released gentle"    # these jobs alone; prints their rows

Jobs live in outputs/iris_shapes/<arm>/seed_<n>; two run side by side, each on one thread.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.diversity import diversity_by_prompt
from t2i_rl.evaluation.records import read_results, read_stage
from t2i_rl.evaluation.stats import bracket, compare_over_seeds, seed_interval
from t2i_rl.evaluation.tables import excludes_zero

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUTPUTS = ROOT / "outputs" / "iris_shapes"
SEEDS = (0, 1, 2)
CONTROL = "random"
EQUAL = ("oracle", "nsc", "sc", "entropy", "length", CONTROL)
GENTLE = "method.optimizer.lr=1.0e-5"
ARMS = {reward: [f"reward={reward}"] for reward in EQUAL}
ARMS |= {f"{reward} gentle": [f"reward={reward}", GENTLE] for reward in ("nsc", "sc", "entropy", CONTROL)}
ARMS |= {"nsc both": ["reward=nsc", "method.image_loss_weight=1"]}
DECAY = "{_target_: torch.optim.lr_scheduler.LinearLR, _partial_: true, start_factor: 1.0, end_factor: 0.0, total_iters: 60}"
RELEASED = ["reward=nsc", "variant=released", f"method.scheduler={DECAY}"]  # half of the decay is run, as there
ARMS |= {"nsc released": RELEASED, "nsc released gentle": [*RELEASED, GENTLE]}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METRICS = ("overall", *(f"task/{task}" for task in TASKS), "held_out", "lenient", "malformed")
LOGGED = ("text/plan_length", "text/self_certainty", "image/self_certainty", "image/codes_used", "text/kl", "image/kl")
KL_LEVELS = (0.01, 0.03, 0.1)
SMOOTH = 5


def folder(arm: str, seed: int) -> Path:
    return OUTPUTS / arm.replace(" ", "_") / f"seed_{seed}"


def run_job(job: tuple[str, int]) -> None:
    """One training run in its own process, resumed where a killed one stopped; its output goes to job.log.

    The base of a seed is drawn once: the evaluator takes it over, if weights, prompts, seeds and settings are the same.
    """
    arm, seed = job
    out = folder(arm, seed)
    if (out / "results.json").exists():
        print(f"{arm} seed {seed}: done before", flush=True)
        return
    drawn = next((folder(other, seed) for other in ARMS if (folder(other, seed) / "results.json").exists()), None)
    if drawn and not out.exists():
        shutil.copytree(drawn / "evaluation" / "base_plan", out / "evaluation" / "base_plan")
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "run.py", "experiment=iris_shapes", *ARMS[arm], f"seed={seed}", f"hydra.run.dir={out}"]
    if (out / "checkpoints" / "last.ckpt").exists():
        command.append("ckpt_path=last")
    with (out / "job.log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{arm} seed {seed} failed with exit code {done.returncode}: see {out / 'job.log'}")
    print(f"{arm} seed {seed}: done", flush=True)


def column(arm: str, seed: int, name: str) -> np.ndarray:
    """One logged metric by step."""
    with (folder(arm, seed) / "metrics.csv").open() as rows:
        return np.array([float(row[name]) for row in csv.DictReader(rows) if row.get(name)])


def smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(SMOOTH) / SMOOTH, mode="valid")


def cell(values: dict, points: bool = True) -> str:
    """`+3.1 [+1.0, +5.2]`, bold where the interval excludes zero."""
    scale, digits = (100, 1) if points else (1, 3)
    form = f"+.{digits}f"
    text = f"{scale * values['difference']:{form}} {bracket(values, form, scale)}"
    return f"**{text}**" if excludes_zero(values) else text


def over_seeds(values: list[float]) -> dict:
    """Mean of one number a seed, with Student's 95 % interval."""
    over = seed_interval(values)
    return {"difference": over["mean"], **over}


def records(arm: str, stage: str) -> list[list[dict]]:
    return [list(read_stage(folder(arm, seed), stage).values()) for seed in SEEDS]


def paired(before: list[list[dict]], after: list[list[dict]]) -> dict:
    """Every metric's paired difference over seeds; `overall` by Student's interval over seeds too."""
    differences = compare_over_seeds(list(zip(before, after, strict=True)))
    by_seed = [compare_over_seeds([pair])["overall"]["difference"] for pair in zip(before, after, strict=True)]
    return {**differences, "overall, Student": over_seeds(by_seed)}


def diversity_change(arm: str) -> dict:
    """Change of the within-prompt spread, mean over prompts."""
    changes = []
    for seed in SEEDS:
        ids = [record["prompt_id"] for record in read_stage(folder(arm, seed), "base_plan").values()]
        before, after = (
            np.load(folder(arm, seed) / "evaluation" / stage / "features.npy")
            for stage in ("base_plan", "trained_plan")
        )
        changes.append(
            diversity_by_prompt(after, ids)["diversity"].mean() - diversity_by_prompt(before, ids)["diversity"].mean()
        )
    return over_seeds(changes)


def logged_change(arm: str, name: str) -> dict:
    """Mean of the last five rollouts minus mean of the first five."""
    series = [column(arm, seed, name) for seed in SEEDS]
    return over_seeds([float(values[-SMOOTH:].mean() - values[:SMOOTH].mean()) for values in series])


def at_kl(arm: str, level: float) -> str:
    """Strict accuracy of the training rollouts when the plans' KL (means of five steps) first reaches a level, less that of the arm that
    hardly moves, at the same steps of the same seed: every arm meets the same prompts in the same order.
    """
    gains = []
    for seed in SEEDS:
        kl, accuracy = smooth(column(arm, seed, "text/kl")), smooth(column(arm, seed, "watch/oracle"))
        reached = np.flatnonzero(kl >= level)
        if not len(reached):
            return "not reached"
        still = smooth(column(f"{CONTROL} gentle", seed, "watch/oracle"))
        gains.append(float(accuracy[reached[0]] - still[reached[0]]))
    return cell(over_seeds(gains))


def rows(names: list[str], columns: list[str], value) -> list[str]:
    """A Markdown table: one row an arm."""
    lines = ["| reward | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {name} | " + " | ".join(value(name)) + " |" for name in names), ""]


def print_rows(arms: list[str]) -> None:
    """Rows of some arms for the tables that need no other arm."""
    measured = ("overall", "overall, Student", *METRICS[1:])
    short = [name.removeprefix("task/") for name in measured]
    changes = {arm: paired(records(arm, "base_plan"), records(arm, "trained_plan")) for arm in arms}
    print("\n".join(rows(arms, short, lambda arm: [cell(changes[arm][name]) for name in measured])))
    print("\n".join(rows(arms, [*LOGGED, "diversity"], moved)))


def moved(arm: str) -> list[str]:
    """What moves inside an arm: last five rollouts minus first five."""
    changes = [*(logged_change(arm, name) for name in LOGGED), diversity_change(arm)]
    return [cell(change, points=False) for change in changes]


def write_table() -> None:
    results = read_results(folder("oracle", 0) / "results.json")
    base = results["stages"]["base_plan"]["metrics"]["overall"]
    against_base = {arm: paired(records(arm, "base_plan"), records(arm, "trained_plan")) for arm in ARMS}
    controls = {arm: " ".join([CONTROL, *arm.split()[1:]]) for arm in ARMS}
    against_control = {
        arm: paired(records(control, "trained_plan"), records(arm, "trained_plan"))
        for arm, control in controls.items()
        if control in ARMS and control != arm
    }
    measured = ("overall", "overall, Student", *METRICS[1:])
    short = [name.removeprefix("task/") for name in measured]
    inside = [*LOGGED, "diversity"]
    runs = [read_json(folder(arm, seed) / "provenance.json") for arm in ARMS for seed in SEEDS]
    commits = " and ".join(sorted({run["git_commit"][:7] for run in runs}))
    lines = [
        "# The sign experiment: what each reward does to janus_tiny on `shapes`",
        "",
        f"`python experiments/iris_shapes/run.py` at {commits}, {runs[0]['device']} a job: {len(ARMS)} arms x {len(SEEDS)} seeds ({', '.join(map(str, SEEDS))}), "
        f"{results['steps']} optimizer steps each, {results['benchmark']['n_prompts']} test prompts x "
        f"{results['benchmark']['samples_per_prompt']} images per stage, strict accuracy with a plan, in points.",
        f"Base with a plan, seed 0: {100 * base['mean']:.1f} % [{100 * base['low']:.1f}, {100 * base['high']:.1f}].",
        "",
        "The six rewards differ in nothing but the reward. `gentle`: a tenth of the learning rate (1e-5). `both`: image tokens trained too "
        "(`method.image_loss_weight=1`, as the paper does). `released`: `variant=released`, the settings of IRIS's released code (both trained, "
        "one mean over all tokens with log V kept, a token mean per prompt, half of a linear decay).",
        "",
        "95 % intervals by a two-level bootstrap (seeds, then prompts), which understates the spread over three seeds; `overall, Student` and all "
        "other tables: Student's interval over seeds, which is wide with three. Bold: excludes zero. No correction for the number of cells.",
        "",
        "## Trained minus base",
        "",
        *rows(list(ARMS), short, lambda arm: [cell(against_base[arm][name]) for name in measured]),
        "## Trained minus the random control at the same learning rate (same seeds, same prompts)",
        "",
        *rows(list(against_control), short, lambda arm: [cell(against_control[arm][name]) for name in measured]),
        "## What moves inside",
        "",
        "Last five rollouts minus first five; diversity from the evaluation.",
        "",
        *rows(list(ARMS), inside, moved),
        "## At equal distance from the base",
        "",
        "Strict accuracy on the training rollouts (64 images a step, means of five steps) when the plans' KL to the base first reaches a level, "
        f"less that of `{CONTROL} gentle` at the same steps (all arms meet the same prompts in the same order).",
        "",
        *rows(
            list(ARMS),
            [f"KL {level} nats a token" for level in KL_LEVELS],
            lambda arm: [at_kl(arm, kl) for kl in KL_LEVELS],
        ),
    ]
    write_atomic(HERE / "table.md", "\n".join(lines))
    print(f"wrote {HERE / 'table.md'}")


def write_figure() -> None:
    """Means over seeds with the band from least to most; at the end, accuracy against distance from the base."""
    panels = ("watch/oracle", "text/plan_length", "text/self_certainty", "image/self_certainty", "image/codes_used")
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), constrained_layout=True)
    for arm in ARMS:
        style = {
            "color": f"C{EQUAL.index(arm.split()[0])}",
            "linestyle": {"gentle": "--", "both": ":", "released": "-."}.get(arm.split()[-1], "-"),
        }
        for axis, name in zip(axes.flat, panels, strict=False):
            series = np.stack([smooth(column(arm, seed, name)) for seed in SEEDS])
            axis.plot(series.mean(axis=0), label=arm, **style)
            axis.fill_between(
                range(series.shape[1]), series.min(axis=0), series.max(axis=0), alpha=0.1, color=style["color"]
            )
        kl, accuracy = (
            np.mean([smooth(column(arm, seed, name)) for seed in SEEDS], axis=0) for name in ("text/kl", "watch/oracle")
        )
        axes.flat[-1].plot(np.maximum(kl, 1e-4), accuracy, **style)
    for axis, name in zip(axes.flat, panels, strict=False):
        axis.set(title=name, xlabel="step (mean of five; band: least and most over seeds)")
    axes.flat[-1].set(title="watch/oracle against the plans' KL", xlabel="text/kl, nats a token", xscale="log")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))
    figure.savefig(HERE / "figure.png", dpi=100)
    print(f"wrote {HERE / 'figure.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild table and figure from finished jobs")
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side, one thread each")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="these alone; prints their rows, writes no table")
    options = parser.parse_args()
    if not options.only_table:
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(run_job, [(arm, seed) for arm in options.arms or ARMS for seed in SEEDS]))
    if options.arms:
        print_rows(options.arms)
    else:
        write_table()
        write_figure()
