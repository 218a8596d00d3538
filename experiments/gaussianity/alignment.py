"""Reward alignment on flux_tiny: every regulariser, the gradient-free rivals, the exact oracle as held-out judge. Writes alignment.md, alignment.png, hacking.png and strip.png.

    python experiments/gaussianity/alignment.py               # what is not done yet, then the tables; an hour on two CPU cores
    python experiments/gaussianity/alignment.py --only-table

66 test prompts, three seeds; 50 iterations, which is 51 pictures and 50 gradients a case. A gradient costs about two more pictures, so each rival runs at 51 pictures (equal
evaluations) and at 151 (equal cost). Jobs live in outputs/gaussianity/<arm>/seed_<n>; two run side by side, each on one thread.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np

from t2i_rl.evaluation.noise_pictures import curves_of, hacking_figure
from t2i_rl.evaluation.results import read_json, write_atomic
from t2i_rl.evaluation.stats import seed_interval
from t2i_rl.evaluation.tables import excludes_zero
from t2i_rl.gaussianity.health import bands

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUTPUTS = ROOT / "outputs" / "gaussianity"
SEEDS = (0, 1, 2)
SHAPE = (8, 8, 8)
SHARED = [
    "model=flux_tiny",
    "data.prompts_per_task=11",
    "method.samples=2",
    "method.batch_size=33",
]
LR = 5.0  # conf/method/optimizer/nesterov.yaml; a balanced penalty leaves the reward about 0.71 of a clipped step
CLIMBS = {
    "none": ["regularizer=none"],
    "none, 0.71 of the step": ["regularizer=none", f"method.optimizer.lr={0.71 * LR:.3f}"],
    "white noise for the spectrum": ["regularizer=white_noise"],
    "norm (ReNO), as published": ["regularizer=reno", "method.balance=null"],
    "norm, balanced": ["regularizer=reno"],
    "KL": ["regularizer=kl"],
    "kurtosis": ["regularizer=kurtosis"],
    "PRNO": ["regularizer=prno"],
    "MPGR (fresh shuffle)": ["regularizer=mpgr"],
    "MPGR, natural order": ["regularizer=mpgr_natural"],
    "GPER": ["regularizer=gper"],
    "GPER, noise alone": ["regularizer=gper", "regularizer.constraint.project_gradient=false"],
    "Langevin, no regulariser": ["regularizer=none", "method/optimizer=langevin"],
}
SEARCHES = {
    f"{name}, {count} pictures": ["method=noise_search", f"method.algorithm={algorithm}", f"method.evaluations={count}"]
    for name, algorithm in (("best of N", "best_of_n"), ("zero order", "zero_order"))
    for count in (51, 151)
}
RIVAL = "best of N, 151 pictures"  # costs what a climb does
ARMS = {**{name: ["method=noise_opt", *settings] for name, settings in CLIMBS.items()}, **SEARCHES}


def folder(arm: str, seed: int) -> Path:
    return OUTPUTS / "".join(letter if letter.isalnum() else "_" for letter in arm.lower()) / f"seed_{seed}"


def run(job: tuple[str, int]) -> None:
    arm, seed = job
    out = folder(arm, seed)
    if (out / "results.json").exists():
        print(f"{arm}, seed {seed}: done before", flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "job.log").open("a") as log:
        command = [sys.executable, "run.py", *ARMS[arm], *SHARED, f"seed={seed}", f"hydra.run.dir={out}"]
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"{arm}, seed {seed}: {'failed, see ' + str(out / 'job.log') if done.returncode else 'done'}", flush=True)


def values(arm: str, seed: int, end: str, name: str) -> np.ndarray:
    """One figure of every case, in order."""
    return np.array([case[end][name] for case in cases(arm, seed)])


def cases(arm: str, seed: int) -> list[dict]:
    return [read_json(file) for file in sorted((folder(arm, seed) / "noise").glob("*/case.json"))]


def trajectories(arm: str) -> list[list[dict]]:
    files = [file for seed in SEEDS for file in sorted((folder(arm, seed) / "noise").glob("*/trajectory.jsonl"))]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def prompts_of(arm: str) -> list[str]:
    """The prompt of each trajectory."""
    return [case["prompt_id"] for seed in SEEDS for case in cases(arm, seed)]


def check_one_model() -> None:
    """All arms must have searched the same model under the same judges."""
    found = {
        json.dumps(read_json(folder(arm, seed) / "results.json")["weights_sha256"]) for arm in ARMS for seed in SEEDS
    }
    if len(found) > 1:
        raise SystemExit(
            f"jobs below {OUTPUTS} were run on {len(found)} different models or judges: delete the old ones"
        )


def over_seeds(arm: str, end: str, name: str, scale: float = 1.0) -> str:
    over = seed_interval([scale * float(values(arm, seed, end, name).mean()) for seed in SEEDS])
    return (
        f"{over['mean']:.1f} [{over['low']:.1f}, {over['high']:.1f}]"
        if scale == 100
        else f"{over['mean']:.2f} [{over['low']:.2f}, {over['high']:.2f}]"
    )


def change(arm: str, end: str, name: str, scale: float, against: tuple[str, str] | None = None) -> str:
    """Paired change against the first noise, or against an end of another arm: two-level bootstrap over seeds and prompts; bold excludes zero."""
    rng, parts = np.random.default_rng(0), []
    for seed in SEEDS:
        before = values(against[0], seed, against[1], name) if against else values(arm, seed, "initial", name)
        parts.append(scale * (values(arm, seed, end, name) - before))
    ids = [case["prompt_id"] for case in cases(arm, SEEDS[0])]
    order = {prompt: [i for i, each in enumerate(ids) if each == prompt] for prompt in dict.fromkeys(ids)}
    by_prompt = np.array([[part[rows].mean() for rows in order.values()] for part in parts])
    picks = rng.integers(0, by_prompt.shape[1], (2000, by_prompt.shape[1]))
    seeds = rng.integers(0, len(SEEDS), (2000, len(SEEDS)))
    draws = by_prompt[seeds[:, :, None], picks[:, None, :]].mean(axis=(1, 2))
    found = {
        "difference": float(by_prompt.mean()),
        "low": float(np.percentile(draws, 2.5)),
        "high": float(np.percentile(draws, 97.5)),
    }
    text = f"{found['difference']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"
    return f"**{text}**" if excludes_zero(found) else text


def write_table() -> None:
    check_one_model()
    made, results = read_json(folder("none", 0) / "provenance.json"), read_json(folder("none", 0) / "results.json")
    count = len(cases("none", 0))
    limits = bands(SHAPE)
    lines = [
        "# Reward alignment on flux_tiny", "",
        f"`python experiments/gaussianity/alignment.py` at {made['git_commit'][:7]}, {made['device']} a job: target `soft_oracle` (log-probability, nats), held out the exact oracle (strict, percent); {count} cases a seed "
        f"({results['comparisons'][0]['metrics']['target']['n_prompts']} test prompts x 2 noises), seeds {', '.join(map(str, SEEDS))}, {results['steps']} iterations. Changes are paired with the same case's first noise; two-level bootstrap over seeds and "
        "prompts, bold excludes zero, no correction for the number of cells. *Best* is the iterate where the target was highest. A climb draws 51 pictures and takes 50 gradients, each "
        f"about two more pictures: what *{RIVAL}* costs. Diversity: mean cosine distance between pictures of one prompt, hundredths.", "",
        f"First noise: target {over_seeds('none', 'initial', 'target')}, oracle {over_seeds('none', 'initial', 'watch/oracle/strict', 100)} %, partial score {over_seeds('none', 'initial', 'watch/oracle/score', 100)} "
        f"(Student's interval over seeds); diversity {diversity('none', 'initial')}.", "",
        f"| arm | target, best | oracle, best (points) | partial score, best | oracle, last | target, best, against {RIVAL} | oracle, best, against {RIVAL} | oracle, best, against no regulariser | diversity, best |", "|---|" + "--:|" * 8,
    ]  # fmt: skip
    for arm in ARMS:
        cells = [
            change(arm, "best", "target", 1),
            change(arm, "best", "watch/oracle/strict", 100),
            change(arm, "best", "watch/oracle/score", 100),
            "" if arm in SEARCHES else change(arm, "last", "watch/oracle/strict", 100),
            "" if arm == RIVAL else change(arm, "best", "target", 1, (RIVAL, "best")),
            "" if arm == RIVAL else change(arm, "best", "watch/oracle/strict", 100, (RIVAL, "best")),
            "" if arm == "none" else change(arm, "best", "watch/oracle/strict", 100, ("none", "best")),
            diversity(arm, "best"),
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    names = ("std", "kurtosis", "lag1_x", "max_power", "spectrum")
    lines += ["", "## The noise at the last iterate", "", "Mean over cases and seeds, and the share of cases within the band that holds 99 % of true noise of this shape.", "",
              "| arm | cosine to the first | " + " | ".join(f"{name} ({limits[name][0]:.2f} to {limits[name][1]:.2f})" for name in names) + " |", "|---|" + "--:|" * (len(names) + 1)]  # fmt: skip
    for arm in CLIMBS:
        cosine = np.mean([rows[-1]["cosine_to_start"] for rows in trajectories(arm)])
        shown = []
        for name in names:
            found = np.concatenate([values(arm, seed, "last", f"health/{name}") for seed in SEEDS])
            inside = ((found >= limits[name][0]) & (found <= limits[name][1])).mean()
            shown.append(f"{found.mean():.2f} ({100 * inside:.0f} %)")
        lines.append(f"| {arm} | {cosine:.3f} | " + " | ".join(shown) + " |")
    write_atomic(HERE / "alignment.md", "\n".join([*lines, ""]))
    print((HERE / "alignment.md").read_text())


def diversity(arm: str, end: str) -> str:
    """Mean cosine distance between pictures of one prompt, in hundredths, Student's interval over seeds; of the first or the best noise."""
    over = seed_interval(
        [
            100 * read_json(folder(arm, seed) / "results.json")["stages"][end]["metrics"]["diversity"]["mean"]
            for seed in SEEDS
        ]
    )
    return f"{over['mean']:.1f} [{over['low']:.1f}, {over['high']:.1f}]"


def write_figures() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for number, arm in enumerate(CLIMBS):
        tracks = trajectories(arm)
        for axis, name, title in zip(axes, ("target", "watch/oracle/strict", "health/spectrum"), ("target (nats)", "oracle, strict", "natural-order 25 L (noise: 2.3)"), strict=True):  # fmt: skip
            steps, mean, half = curves_of(tracks, name, prompts_of(arm))
            axis.plot(steps, mean, label=arm, color=f"C{number}")
            axis.fill_between(steps, mean - half, mean + half, color=f"C{number}", alpha=0.12)
            axis.set(title=title, xlabel="iteration")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(HERE / "alignment.png", dpi=100)
    hacking_figure(
        trajectories("none"),
        HERE / "hacking.png",
        ["oracle/strict", "oracle/score"],
        prompts_of("none"),
        "no regulariser",
    )
    shutil.copy(sorted((folder("MPGR (fresh shuffle)", 0) / "strips").glob("*.png"))[0], HERE / "strip.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild tables and figures from finished jobs")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if not options.only_table:
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(run, [(arm, seed) for seed in SEEDS for arm in ARMS]))
    write_table()
    write_figures()
