"""Reward alignment on flux_tiny: every regulariser, the gradient-free rivals, the exact oracle as held-out judge.

Writes steps.md, hacking.png, alignment.md, alignment.png and strip.png.

    python experiments/gaussianity/alignment.py               # what is not done yet, then the tables; two hours
    python experiments/gaussianity/alignment.py --only-table  # from what is kept in alignment/, which is committed

66 test prompts, three seeds; 50 iterations, which is 51 pictures and 50 gradients a case. A gradient costs about two
more pictures, so each rival runs at 51 pictures (equal evaluations) and at 151 (equal cost). The step is ten times the
published one, the best of four on validation prompts. Jobs live in outputs/gaussianity/<arm>/seed_<n>; two run side by
side, each on one thread; what the tables need of a finished one is kept in alignment/<arm>_seed_<n>.json.gz.

The tables' bootstrap draws all prompts as one lot. By task, eleven prompts each (`strata`), it would be the right one
for this benchmark, and its intervals narrower: docs/LOG.md, 2026-11-28. They are as they were published.
"""

import gzip
import json
import shutil
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, read_json_lines, read_object, write_atomic
from t2i_rl.evaluation.stats import compare_values, compare_values_over_seeds
from t2i_rl.gaussianity.health import bands
from t2i_rl.methods.noise.pictures import curves_of, hacking_figure
from t2i_rl.study.arms import Study
from t2i_rl.study.jobs import Job
from t2i_rl.study.queue import run_jobs
from t2i_rl.study.report import in_one_line, save_figure, study_parser
from t2i_rl.study.tables import difference_cell, markdown, mean_cell, share_cell

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SEEDS = (0, 1, 2)
SHAPE = (8, 8, 8)
PUBLISHED = 5.0  # ReNO's learning rate; MPGR's is not known
LR = 50.0  # of STEPS the one with the highest target on validation prompts, without a regulariser and with MPGR
STEPS = (5, 15, 50, 150)
OPT, SEARCH, PLAIN = "method=noise_opt", "method=noise_search", "regularizer=none"
SHARED = ["model=flux_tiny", "data.prompts_per_task=11", "method.samples=2", "method.batch_size=33"]
VALIDATED = ["data.split=validation", "data.prompts_per_task=8", "method.samples=1", "method.batch_size=48"]


def rate(value: float) -> str:
    return f"method.optimizer.lr={value}"


VALIDATION = {
    f"validation, {name}, lr {lr}": [OPT, setting, rate(lr), *VALIDATED]
    for name, setting in (("none", PLAIN), ("MPGR", "regularizer=mpgr"))
    for lr in STEPS
}
HACKED = f"validation, none, lr {STEPS[-1]}"
REGULARIZERS = {
    "none": [PLAIN],
    "none, 0.71 of the step": [PLAIN, rate(round(0.71 * LR, 3))],  # what a balanced penalty leaves of a clipped step
    "white noise for the spectrum": ["regularizer=white_noise"],
    "norm": ["regularizer=reno"],
    "KL": ["regularizer=kl"],
    "kurtosis": ["regularizer=kurtosis"],
    "PRNO": ["regularizer=prno"],
    "MPGR (fresh shuffle)": ["regularizer=mpgr"],
    "MPGR, natural order": ["regularizer=mpgr_natural"],
    "GPER": ["regularizer=gper"],
    "GPER, noise alone": ["regularizer=gper", "regularizer.constraint.project_gradient=false"],
}
OTHERS = {
    "Langevin, no regulariser": [PLAIN, "method/optimizer=langevin"],
    "none, published step": [PLAIN, rate(PUBLISHED)],
    "norm (ReNO), as published": ["regularizer=reno", "method.balance=null", rate(PUBLISHED)],
    "MPGR, published step": ["regularizer=mpgr", rate(PUBLISHED)],
}
CLIMBS = {name: [OPT, rate(LR), *settings] for name, settings in REGULARIZERS.items()}
CLIMBS |= {name: [OPT, *settings] for name, settings in OTHERS.items()}
SEARCHES = {
    f"{name}, {count} pictures": [SEARCH, f"method.algorithm={algorithm}", f"method.evaluations={count}"]
    for name, algorithm in (("best of N", "best_of_n"), ("zero order", "zero_order"))
    for count in (51, 151)
}
ARMS = CLIMBS | SEARCHES
RIVAL = "best of N, 151 pictures"  # costs what a climb does
study = Study(ROOT / "outputs" / "gaussianity", VALIDATION | ARMS, SEEDS, SHARED, base=None, root=ROOT)

TARGET, STRICT, SCORE = WATCHED = ("target", "watch/oracle/strict", "watch/oracle/score")
HEALTH = ("std", "kurtosis", "lag1_x", "max_power", "spectrum")
FIGURES = (*WATCHED, *(f"health/{name}" for name in HEALTH))
ON_THE_WAY = ("step", *WATCHED, "health/spectrum", "cosine_to_start")
STRIP = ("MPGR (fresh shuffle)", 0)


def jobs() -> dict[tuple[str, int], Job]:
    """By arm and seed; step sizes are chosen by the first seed."""
    names = [(arm, 0) for arm in VALIDATION] + [(arm, seed) for seed in SEEDS for arm in ARMS]
    return {name: study.job(*name) for name in names}


def kept_file(arm: str, seed: int) -> Path:
    slug = "".join(letter if letter.isalnum() else "_" for letter in arm.lower())
    return HERE / "alignment" / f"{slug}_seed_{seed}.json.gz"


def keep(job: Job, arm: str, seed: int) -> None:
    """Of a finished job what tables and curves need: every case at its ends, and where all was measured on the way."""
    results, provenance = read_json(job.folder / "results.json"), read_json(job.folder / "provenance.json")
    folders = [file.parent for file in sorted((job.folder / "noise").glob("*/case.json"))]
    cases = [read_json(folder / "case.json") for folder in folders]
    tracks = [[row.value for row in read_json_lines(folder / "trajectory.jsonl")] for folder in folders]
    stages = results["stages"]
    content = {
        "made": {
            **{name: provenance[name] for name in ("git_commit", "device")},
            "command": read_object(job.record, "command")["command"],
        },
        "weights_sha256": results["weights_sha256"],
        "steps": results["steps"],
        "diversity": {end: stage["metrics"].get("diversity") for end, stage in stages.items()},
        "prompt_ids": [case["prompt_id"] for case in cases],
        "ends": {end: {name: [short(case[end][name]) for case in cases] for name in FIGURES} for end in stages},
        "tracks": [
            [{name: short(row[name]) for name in ON_THE_WAY if name in row} for row in rows if STRICT in row]
            for rows in tracks
        ],
    }
    write_atomic(kept_file(arm, seed), gzip.compress(json.dumps(content).encode(), mtime=0))
    if (arm, seed) == STRIP:
        shutil.copy(sorted((job.folder / "strips").glob("*.png"))[0], HERE / "strip.png")


def short(value: float) -> float:
    """Five digits, for the size of what is kept."""
    return float(f"{value:.5g}")


@cache
def read(arm: str, seed: int) -> dict:
    return json.loads(gzip.decompress(kept_file(arm, seed).read_bytes()))


def values(arm: str, seed: int, end: str, name: str) -> np.ndarray:
    """One figure of every case, in order."""
    return np.array(read(arm, seed)["ends"][end][name])


def over_all_seeds(arm: str, name: str) -> list:
    """The cases' tracks, or the prompts' ids, of one seed after another."""
    return [case for seed in SEEDS for case in read(arm, seed)[name]]


def check_kept(names: list[tuple[str, int]]) -> None:
    """Whether what is kept is there, was made by these arms, and with one model under one set of judges.

    What was kept before 2026-11-28 does not say by which command it was made.

    Raises:
        UserError: something is missing, stale, or of another model.
    """
    missing = [f"{arm}, seed {seed}" for arm, seed in names if not kept_file(arm, seed).exists()]
    if missing:
        raise UserError(f"no table: {len(missing)} of {len(names)} jobs are not done, the first is {missing[0]}")
    for arm, seed in names:
        asked = study.job(arm, seed).facts()["command"]
        if (command := read(arm, seed)["made"].get("command", asked)) != asked:
            raise UserError(f"{kept_file(arm, seed)} was made by {command}: delete it, or bring that back")
    models = {json.dumps(read(*name)["weights_sha256"], sort_keys=True) for name in names}
    if len(models) > 1:
        raise UserError(f"{HERE / 'alignment'} is of {len(models)} different models or judges: delete the old ones")


def level_cell(arm: str, end: str, name: str) -> str:
    """Mean over seeds of a figure, percent of a verdict, with Student's interval."""
    means = [float(values(arm, seed, end, name).mean()) for seed in SEEDS]
    return mean_cell(means, ".2f") if name == TARGET else share_cell(means)


def diversity_cell(arm: str, end: str) -> str:
    """Mean cosine distance between pictures of one prompt, in hundredths; of the first or the best noise."""
    return mean_cell([100 * read(arm, seed)["diversity"][end]["mean"] for seed in SEEDS])


def change_cell(arm: str, end: str, name: str, other: tuple[str, str] | None = None, seeds=SEEDS) -> str:
    """Paired change against the first noise, or against an end of another arm: bootstrap over seeds, then prompts."""
    other_arm, other_end = other or (arm, "initial")
    scale = 1 if name == TARGET else 100
    changes = np.array(
        [scale * (values(arm, seed, end, name) - values(other_arm, seed, other_end, name)) for seed in seeds]
    )
    ids = read(arm, seeds[0])["prompt_ids"]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(ids))}
    prompts = np.array([numbers[prompt] for prompt in ids])
    over_seeds = len(seeds) > 1
    change = compare_values_over_seeds(changes, prompts) if over_seeds else compare_values(changes[0], prompts)
    return difference_cell(change, scale=1)


def arm_row(arm: str) -> list[str]:
    return [
        arm,
        *(change_cell(arm, "best", name) for name in WATCHED),
        "" if arm in SEARCHES else change_cell(arm, "last", STRICT),
        *("" if arm == RIVAL else change_cell(arm, "best", name, (RIVAL, "best")) for name in (TARGET, STRICT)),
        "" if arm == "none" else change_cell(arm, "best", STRICT, ("none", "best")),
        diversity_cell(arm, "best"),
    ]


def noise_row(arm: str, limits: dict[str, tuple[float, float]]) -> list[str]:
    cosine = np.mean([rows[-1]["cosine_to_start"] for rows in over_all_seeds(arm, "tracks")])
    cells = []
    for name in HEALTH:
        figures = np.concatenate([values(arm, seed, "last", f"health/{name}") for seed in SEEDS])
        cells.append(f"{figures.mean():.2f} ({within(figures, limits[name])})")
    return [arm, f"{cosine:.3f}", *cells]


def within(figures: np.ndarray, limits: tuple[float, float]) -> str:
    return f"{100 * ((figures >= limits[0]) & (figures <= limits[1])).mean():.0f} %"


def write_table() -> None:
    one, limits = read("none", 0), bands(SHAPE)
    count, prompts = len(one["prompt_ids"]), len(set(one["prompt_ids"]))
    made = f"{one['made']['git_commit'][:7]}, {one['made']['device'].removesuffix('s')}"
    first = [level_cell("none", "initial", name) for name in WATCHED]
    head = ["arm", "target, best", "oracle, best (points)", "partial score, best", "oracle, last"]
    head += [f"target, best, against {RIVAL}", f"oracle, best, against {RIVAL}"]
    head += ["oracle, best, against no regulariser", "diversity, best"]
    measured = [f"{name} ({limits[name][0]:.2f} to {limits[name][1]:.2f})" for name in HEALTH]
    lines = [
        "# Reward alignment on flux_tiny",
        "",
        f"`python experiments/gaussianity/alignment.py` at {made} a job: target `soft_oracle` (log-probability, nats), "
        f"held out the exact oracle (strict, percent); {count} cases a seed ({prompts} test prompts x "
        f"{count // prompts} noises), seeds {', '.join(map(str, SEEDS))}, {one['steps']} iterations at learning rate "
        f"{LR:g}, ten times the published one. Changes are paired with the same case's first noise; two-level "
        "bootstrap over seeds and prompts, bold excludes zero, no correction for the number of cells. *Best* is the "
        "iterate where the target was highest. A climb draws 51 pictures and takes 50 gradients, each about two more "
        f"pictures: what *{RIVAL}* costs. Diversity: mean cosine distance between pictures of one prompt, hundredths.",
        "",
        f"First noise: target {first[0]}, oracle {first[1]} %, partial score {first[2]} (Student's interval over "
        f"seeds); diversity {diversity_cell('none', 'initial')}.",
        "",
        *markdown(head, [arm_row(arm) for arm in ARMS], names=1),
        "## The noise at the last iterate",
        "",
        "Mean over cases and seeds, and the share of cases within the band that holds 99 % of true noise of this "
        "shape.",
        "",
        *markdown(["arm", "cosine to the first", *measured], [noise_row(arm, limits) for arm in CLIMBS], names=1),
    ]
    write_atomic(HERE / "alignment.md", "\n".join(lines))
    print("\n".join(lines))


def step_row(arm: str) -> list[str]:
    none = arm.replace("MPGR", "none")
    return [
        arm.removeprefix("validation, "),
        *(change_cell(arm, end, name, seeds=(0,)) for name in (TARGET, STRICT) for end in ("best", "last")),
        within(values(arm, 0, "last", "health/spectrum"), bands(SHAPE)["spectrum"]),
        "" if arm == none else change_cell(arm, "last", STRICT, (none, "last"), seeds=(0,)),
    ]


def write_steps() -> None:
    """Step sizes on validation prompts, and what the longest does: steps.md and hacking.png."""
    one = read(HACKED, 0)
    first = {name: np.mean(one["ends"]["initial"][name]) for name in FIGURES}
    head = ["arm", "target, best", "target, last", "oracle, best (points)", "oracle, last"]
    head += ["spectrum in the band, last", "oracle, last, against none"]
    lines = [
        "# Step sizes, on validation prompts",
        "",
        f"`python experiments/gaussianity/alignment.py`, {one['made']['device'].removesuffix('s')} a job: "
        f"{len(one['prompt_ids'])} validation prompts, one noise each, seed 0, {one['steps']} iterations; published "
        f"learning rate {PUBLISHED:g}. First noise: target {first[TARGET]:.2f} nats, oracle {100 * first[STRICT]:.1f} "
        "%. Changes are paired with the same case's first noise, the last column with no regulariser at the same step; "
        "bootstrap over prompts, bold excludes zero. The spectrum's band holds 99 % of true noise.",
        "",
        *markdown(head, [step_row(arm) for arm in VALIDATION], names=1),
    ]
    write_atomic(HERE / "steps.md", "\n".join(lines))
    title = f"no regulariser, {STEPS[-1] / PUBLISHED:g} times the published step"
    judges = [name.removeprefix("watch/") for name in (STRICT, SCORE)]
    hacking_figure(one["tracks"], HERE / "hacking.png", judges, one["prompt_ids"], title)


def write_figures() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    shown = {TARGET: "target (nats)", STRICT: "oracle, strict", "health/spectrum": "natural-order 25 L (noise: 2.3)"}
    for number, arm in enumerate(CLIMBS):
        tracks, ids = over_all_seeds(arm, "tracks"), over_all_seeds(arm, "prompt_ids")
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for axis, (name, title) in zip(axes, shown.items(), strict=True):
            steps, mean, half = curves_of(tracks, name, ids)
            axis.plot(steps, mean, label=arm, **style)
            axis.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.12)
            axis.set(title=title, xlabel="iteration")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    save_figure(figure, HERE / "alignment.png")


def main() -> None:
    options = study_parser(__doc__).parse_args()
    if not options.only_table:
        open_jobs = {job: name for name, job in jobs().items() if not kept_file(*name).exists()}
        run_jobs(list(open_jobs), options.workers, finished=lambda job: keep(job, *open_jobs[job]))
    check_kept([(arm, 0) for arm in VALIDATION])
    write_steps()
    check_kept([(arm, seed) for seed in SEEDS for arm in ARMS])
    write_table()
    write_figures()


if __name__ == "__main__":
    in_one_line(main)
