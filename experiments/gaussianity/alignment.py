"""Reward alignment on flux_tiny: every regulariser, the gradient-free rivals, the exact oracle as held-out judge. Writes steps.md, hacking.png, alignment.md, alignment.png and strip.png.

    python experiments/gaussianity/alignment.py               # what is not done yet, then the tables; two hours on two CPU cores
    python experiments/gaussianity/alignment.py --only-table  # from the figures of every case in alignment/, which are committed

66 test prompts, three seeds; 50 iterations, which is 51 pictures and 50 gradients a case. A gradient costs about two more pictures, so each rival runs at 51 pictures (equal
evaluations) and at 151 (equal cost). The step is ten times the published one, the best of four on validation prompts. Jobs live in outputs/gaussianity/<arm>/seed_<n>; two run side by side, each on one
thread; what the tables need of a finished one is kept in alignment/<arm>_seed_<n>.json.gz.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.stats import bracket, seed_interval
from t2i_rl.evaluation.tables import excludes_zero
from t2i_rl.gaussianity.health import bands
from t2i_rl.methods.noise.pictures import curves_of, hacking_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUTPUTS = ROOT / "outputs" / "gaussianity"
SEEDS = (0, 1, 2)
SHAPE = (8, 8, 8)
STRIP = ("MPGR (fresh shuffle)", 0)
SHARED = [
    "model=flux_tiny",
    "data.prompts_per_task=11",
    "method.samples=2",
    "method.batch_size=33",
]
PUBLISHED = 5.0  # ReNO's learning rate; MPGR's is not known
LR = (
    50.0  # of 5, 15, 50, 150 the one with the highest target on validation prompts, without a regulariser and with MPGR
)
STEPS = (5, 15, 50, 150)
VALIDATION = {
    f"validation, {name}, lr {lr}": ["method=noise_opt", *settings, f"method.optimizer.lr={lr}", *SHARED, "data.split=validation", "data.prompts_per_task=8", "method.samples=1", "method.batch_size=48"]
    for name, settings in (("none", ["regularizer=none"]), ("MPGR", ["regularizer=mpgr"]))
    for lr in STEPS
}  # fmt: skip
HACKED = f"validation, none, lr {STEPS[-1]}"
REGULARIZERS = {
    "none": ["regularizer=none"],
    "none, 0.71 of the step": ["regularizer=none", f"method.optimizer.lr={0.71 * LR:.3f}"],  # what a balanced penalty leaves the reward of a clipped step
    "white noise for the spectrum": ["regularizer=white_noise"],
    "norm": ["regularizer=reno"],
    "KL": ["regularizer=kl"],
    "kurtosis": ["regularizer=kurtosis"],
    "PRNO": ["regularizer=prno"],
    "MPGR (fresh shuffle)": ["regularizer=mpgr"],
    "MPGR, natural order": ["regularizer=mpgr_natural"],
    "GPER": ["regularizer=gper"],
    "GPER, noise alone": ["regularizer=gper", "regularizer.constraint.project_gradient=false"],
}  # fmt: skip
OTHERS = {
    "Langevin, no regulariser": ["regularizer=none", "method/optimizer=langevin"],
    "none, published step": ["regularizer=none", f"method.optimizer.lr={PUBLISHED}"],
    "norm (ReNO), as published": ["regularizer=reno", "method.balance=null", f"method.optimizer.lr={PUBLISHED}"],
    "MPGR, published step": ["regularizer=mpgr", f"method.optimizer.lr={PUBLISHED}"],
}
CLIMBS = {name: [f"method.optimizer.lr={LR}", *settings] for name, settings in REGULARIZERS.items()} | OTHERS
SEARCHES = {
    f"{name}, {count} pictures": ["method=noise_search", f"method.algorithm={algorithm}", f"method.evaluations={count}"]
    for name, algorithm in (("best of N", "best_of_n"), ("zero order", "zero_order"))
    for count in (51, 151)
}
RIVAL = "best of N, 151 pictures"  # costs what a climb does
ARMS = {
    arm: settings + SHARED
    for arm, settings in (
        {name: ["method=noise_opt", *settings] for name, settings in CLIMBS.items()} | SEARCHES
    ).items()
}
HEALTH = ("std", "kurtosis", "lag1_x", "max_power", "spectrum")
WATCHED = ("watch/oracle/strict", "watch/oracle/score")
FIGURES = ("target", *WATCHED, *(f"health/{name}" for name in HEALTH))


def slug(arm: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in arm.lower())


def folder(arm: str, seed: int) -> Path:
    return OUTPUTS / slug(arm) / f"seed_{seed}"


def kept(arm: str, seed: int) -> Path:
    return HERE / "alignment" / f"{slug(arm)}_seed_{seed}.json.gz"


def run(job: tuple[str, int]) -> None:
    arm, seed = job
    out = folder(arm, seed)
    if kept(arm, seed).exists():
        print(f"{arm}, seed {seed}: done before", flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "job.log").open("a") as log:
        command = [sys.executable, "run.py", *(ARMS | VALIDATION)[arm], f"seed={seed}", f"hydra.run.dir={out}"]
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if not done.returncode:
        keep(arm, seed)
    print(f"{arm}, seed {seed}: {'failed, see ' + str(out / 'job.log') if done.returncode else 'done'}", flush=True)


def keep(arm: str, seed: int) -> None:
    """Of a finished job what the tables and curves need: the figures of every case at its ends, and where all were measured on the way."""
    out = folder(arm, seed)
    results, made = read_json(out / "results.json"), read_json(out / "provenance.json")
    places = [file.parent for file in sorted((out / "noise").glob("*/case.json"))]
    cases = [read_json(place / "case.json") for place in places]
    tracks = [[json.loads(line) for line in (place / "trajectory.jsonl").read_text().splitlines()] for place in places]
    on_the_way = ("step", "target", *WATCHED, "health/spectrum", "cosine_to_start")
    found = {
        "made": {name: made[name] for name in ("git_commit", "device")},
        "weights_sha256": results["weights_sha256"],
        "steps": results["steps"],
        "diversity": {end: stage["metrics"].get("diversity") for end, stage in results["stages"].items()},
        "prompt_ids": [case["prompt_id"] for case in cases],
        "ends": {end: {name: [short(case[end][name]) for case in cases] for name in FIGURES} for end in results["stages"]},
        "tracks": [[{name: short(row[name]) for name in on_the_way if name in row} for row in rows if WATCHED[0] in row] for rows in tracks],
    }  # fmt: skip
    kept(arm, seed).parent.mkdir(exist_ok=True)
    write_atomic(kept(arm, seed), gzip.compress(json.dumps(found).encode(), mtime=0))
    if (arm, seed) == STRIP:
        shutil.copy(sorted((out / "strips").glob("*.png"))[0], HERE / "strip.png")


def short(value: float) -> float:
    """Five digits, for the size of what is kept."""
    return float(f"{value:.5g}")


@cache
def read(arm: str, seed: int) -> dict:
    return json.loads(gzip.decompress(kept(arm, seed).read_bytes()))


def values(arm: str, seed: int, end: str, name: str) -> np.ndarray:
    """One figure of every case, in order."""
    return np.array(read(arm, seed)["ends"][end][name])


def over_all_seeds(arm: str, name: str) -> list:
    """The cases' tracks, or the prompts' ids, of one seed after another."""
    return [each for seed in SEEDS for each in read(arm, seed)[name]]


def check_one_model() -> None:
    """All arms must have searched the same model under the same judges."""
    found = {json.dumps(read(arm, seed)["weights_sha256"], sort_keys=True) for arm in ARMS for seed in SEEDS}
    if len(found) > 1:
        raise SystemExit(
            f"jobs in {HERE / 'alignment'} were run on {len(found)} different models or judges: delete the old ones"
        )


def over_seeds(arm: str, end: str, name: str, scale: float = 1.0) -> str:
    means = [float(values(arm, seed, end, name).mean()) for seed in SEEDS]
    over, form = (seed_interval(means, (0.0, 1.0)), ".1f") if scale == 100 else (seed_interval(means), ".2f")
    return f"{scale * over['mean']:{form}} {bracket(over, form, scale)}"


def change(
    arm: str, end: str, name: str, scale: float, against: tuple[str, str] | None = None, seeds: tuple[int, ...] = SEEDS
) -> str:
    """Paired change against the first noise, or against an end of another arm: two-level bootstrap over seeds and prompts; bold excludes zero."""
    rng, parts = np.random.default_rng(0), []
    for seed in seeds:
        before = values(against[0], seed, against[1], name) if against else values(arm, seed, "initial", name)
        parts.append(scale * (values(arm, seed, end, name) - before))
    ids = read(arm, seeds[0])["prompt_ids"]
    order = {prompt: [i for i, each in enumerate(ids) if each == prompt] for prompt in dict.fromkeys(ids)}
    by_prompt = np.array([[part[rows].mean() for rows in order.values()] for part in parts])
    picks = rng.integers(0, by_prompt.shape[1], (2000, by_prompt.shape[1]))
    chosen = rng.integers(0, len(seeds), (2000, len(seeds)))
    draws = by_prompt[chosen[:, :, None], picks[:, None, :]].mean(axis=(1, 2))
    found = {
        "difference": float(by_prompt.mean()),
        "low": float(np.percentile(draws, 2.5)),
        "high": float(np.percentile(draws, 97.5)),
    }
    text = f"{found['difference']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}]"
    return f"**{text}**" if excludes_zero(found) else text


def write_table() -> None:
    check_one_model()
    one = read("none", 0)
    count, limits = len(one["prompt_ids"]), bands(SHAPE)
    lines = [
        "# Reward alignment on flux_tiny", "",
        f"`python experiments/gaussianity/alignment.py` at {one['made']['git_commit'][:7]}, {one['made']['device'].removesuffix('s')} a job: target `soft_oracle` (log-probability, nats), held out the exact oracle (strict, percent); {count} cases a seed "
        f"({len(set(one['prompt_ids']))} test prompts x {count // len(set(one['prompt_ids']))} noises), seeds {', '.join(map(str, SEEDS))}, {one['steps']} iterations at learning rate {LR:g}, ten times the published one. Changes are paired with the same case's first noise; two-level bootstrap over seeds and "
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
    lines += ["", "## The noise at the last iterate", "", "Mean over cases and seeds, and the share of cases within the band that holds 99 % of true noise of this shape.", "",
              "| arm | cosine to the first | " + " | ".join(f"{name} ({limits[name][0]:.2f} to {limits[name][1]:.2f})" for name in HEALTH) + " |", "|---|" + "--:|" * (len(HEALTH) + 1)]  # fmt: skip
    for arm in CLIMBS:
        cosine = np.mean([rows[-1]["cosine_to_start"] for rows in over_all_seeds(arm, "tracks")])
        shown = []
        for name in HEALTH:
            found = np.concatenate([values(arm, seed, "last", f"health/{name}") for seed in SEEDS])
            inside = ((found >= limits[name][0]) & (found <= limits[name][1])).mean()
            shown.append(f"{found.mean():.2f} ({100 * inside:.0f} %)")
        lines.append(f"| {arm} | {cosine:.3f} | " + " | ".join(shown) + " |")
    write_atomic(HERE / "alignment.md", "\n".join([*lines, ""]))
    print((HERE / "alignment.md").read_text())


def write_steps() -> None:
    """Step sizes on validation prompts, and what the longest does: steps.md and hacking.png."""
    one, (low, high) = read(HACKED, 0), bands(SHAPE)["spectrum"]
    first = {name: np.mean(one["ends"]["initial"][name]) for name in FIGURES}
    lines = [
        "# Step sizes, on validation prompts", "",
        f"`python experiments/gaussianity/alignment.py`, {one['made']['device'].removesuffix('s')} a job: {len(one['prompt_ids'])} validation prompts, one noise each, seed 0, {one['steps']} iterations; published learning rate {PUBLISHED:g}. First noise: "
        f"target {first['target']:.2f} nats, oracle {100 * first[WATCHED[0]]:.1f} %. Changes are paired with the same case's first noise, the last column with no regulariser at the same step; bootstrap over prompts, bold excludes zero. "
        f"The spectrum's band holds 99 % of true noise.", "",
        "| arm | target, best | target, last | oracle, best (points) | oracle, last | spectrum in the band, last | oracle, last, against none |", "|---|" + "--:|" * 6,
    ]  # fmt: skip
    for arm in VALIDATION:
        spectrum, none = values(arm, 0, "last", "health/spectrum"), arm.replace("MPGR", "none")
        cells = [change(arm, end, "target", 1, seeds=(0,)) for end in ("best", "last")]
        cells += [change(arm, end, WATCHED[0], 100, seeds=(0,)) for end in ("best", "last")]
        cells.append(f"{100 * ((spectrum >= low) & (spectrum <= high)).mean():.0f} %")
        cells.append("" if arm == none else change(arm, "last", WATCHED[0], 100, (none, "last"), seeds=(0,)))
        lines.append(f"| {arm.removeprefix('validation, ')} | " + " | ".join(cells) + " |")
    write_atomic(HERE / "steps.md", "\n".join([*lines, ""]))
    title = f"no regulariser, {STEPS[-1] / PUBLISHED:g} times the published step"
    watched = [name.removeprefix("watch/") for name in WATCHED]
    hacking_figure(one["tracks"], HERE / "hacking.png", watched, one["prompt_ids"], title)


def diversity(arm: str, end: str) -> str:
    """Mean cosine distance between pictures of one prompt, in hundredths, Student's interval over seeds; of the first or the best noise."""
    over = seed_interval([100 * read(arm, seed)["diversity"][end]["mean"] for seed in SEEDS])
    return f"{over['mean']:.1f} {bracket(over)}"


def write_figures() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for number, arm in enumerate(CLIMBS):
        tracks, ids = over_all_seeds(arm, "tracks"), over_all_seeds(arm, "prompt_ids")
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for axis, name, title in zip(axes, ("target", WATCHED[0], "health/spectrum"), ("target (nats)", "oracle, strict", "natural-order 25 L (noise: 2.3)"), strict=True):  # fmt: skip
            steps, mean, half = curves_of(tracks, name, ids)
            axis.plot(steps, mean, label=arm, **style)
            axis.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.12)
            axis.set(title=title, xlabel="iteration")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(HERE / "alignment.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild tables and figures from finished jobs")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [(arm, 0) for arm in VALIDATION] + [(arm, seed) for seed in SEEDS for arm in ARMS]
    if not options.only_table:
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(run, jobs))
    write_steps()
    missing = [f"{arm}, seed {seed}" for arm, seed in jobs if not kept(arm, seed).exists()]
    if missing:
        raise SystemExit(f"no alignment.md: {len(missing)} of {len(jobs)} jobs are not done, the first is {missing[0]}")
    write_table()
    write_figures()
