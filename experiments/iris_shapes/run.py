"""The sign experiment of IRIS (arXiv 2509.25562 section 4) on `shapes`: six rewards, three seeds, equal steps.

The intrinsic rewards and the control run once more at a gentler learning rate, NSC on image tokens too, and NSC as
IRIS's released code has it.

    python experiments/iris_shapes/run.py                 # what is not done yet, then table.md and figure.png
    python experiments/iris_shapes/run.py --only-table
    python experiments/iris_shapes/run.py --arms "nsc released" "nsc released gentle"    # prints their rows

Jobs live in outputs/iris_shapes/<arm>/seed_<n>; two run side by side, each on one thread.
"""

from pathlib import Path

import matplotlib
import numpy as np

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.records import read_results
from t2i_rl.evaluation.stats import seed_difference
from t2i_rl.study.arms import STUDENT, Study
from t2i_rl.study.jobs import commits_of, require_done
from t2i_rl.study.report import in_one_line, save_figure, study_parser
from t2i_rl.study.tables import difference_cell, markdown, metric_cells, metric_names

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CONTROL = "random"
EQUAL = ("oracle", "nsc", "sc", "entropy", "length", CONTROL)
GENTLE = "method.optimizer.lr=1.0e-5"
DECAY = (
    "{_target_: torch.optim.lr_scheduler.LinearLR, _partial_: true, "
    "start_factor: 1.0, end_factor: 0.0, total_iters: 60}"
)
RELEASED = ["reward=nsc", "variant=released", f"method.scheduler={DECAY}"]  # half of the decay is run, as there
ARMS = {reward: [f"reward={reward}"] for reward in EQUAL}
ARMS |= {f"{reward} gentle": [f"reward={reward}", GENTLE] for reward in ("nsc", "sc", "entropy", CONTROL)}
ARMS |= {"nsc both": ["reward=nsc", "method.image_loss_weight=1"]}
ARMS |= {"nsc released": RELEASED, "nsc released gentle": [*RELEASED, GENTLE]}
study = Study(ROOT / "outputs" / "iris_shapes", ARMS, shared=["experiment=iris_shapes"], root=ROOT)

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METRICS = ("overall", STUDENT, *(f"task/{task}" for task in TASKS), "held_out", "lenient", "malformed")
LOGGED = ("text/plan_length", "text/self_certainty", "image/self_certainty", "image/codes_used", "text/kl", "image/kl")
KL_LEVELS = (0.01, 0.03, 0.1)
SMOOTH = 5


def column(arm: str, seed: int, name: str) -> np.ndarray:
    """One logged metric by step."""
    return study.logged(arm, seed, name)[1]


def smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(SMOOTH) / SMOOTH, mode="valid")


def inside_cells(arm: str) -> list[str]:
    """What moves inside an arm: of what is logged, the last five rollouts minus the first five; the diversity."""
    changes = []
    for name in LOGGED:
        series = [column(arm, seed, name) for seed in study.seeds]
        changes.append([float(values[-SMOOTH:].mean() - values[:SMOOTH].mean()) for values in series])
    before, after = study.diversity(arm, study.base), study.diversity(arm, study.trained)
    changes.append([b - a for a, b in zip(before, after, strict=True)])
    return [difference_cell(seed_difference(by_seed), scale=1, digits=3) for by_seed in changes]


def at_kl(arm: str, level: float) -> str:
    """Strict accuracy of the training rollouts when the plans' KL (means of five steps) first reaches a level.

    Less that of the arm that hardly moves, at the same steps of the same seed: every arm meets the same prompts in the
    same order.
    """
    gains = []
    for seed in study.seeds:
        kl, accuracy = smooth(column(arm, seed, "text/kl")), smooth(column(arm, seed, "watch/oracle"))
        reached = np.flatnonzero(kl >= level)
        if not len(reached):
            return "not reached"
        still = smooth(column(f"{CONTROL} gentle", seed, "watch/oracle"))
        gains.append(float(accuracy[reached[0]] - still[reached[0]]))
    return difference_cell(seed_difference(gains))


def base_table(arms: list[str]) -> list[str]:
    rows = [[arm, *metric_cells(study.against_base(arm), METRICS)] for arm in arms]
    return markdown(["reward", *metric_names(METRICS)], rows)


def control_table() -> list[str]:
    """Every arm against the random control at its own learning rate, where there is one."""
    controls = {arm: " ".join([CONTROL, *arm.split()[1:]]) for arm in ARMS}
    pairs = [(control, arm) for arm, control in controls.items() if control in ARMS and control != arm]
    rows = [[arm, *metric_cells(study.against(control, arm), METRICS)] for control, arm in pairs]
    return markdown(["reward", *metric_names(METRICS)], rows)


def inside_table(arms: list[str]) -> list[str]:
    return markdown(["reward", *LOGGED, "diversity"], [[arm, *inside_cells(arm)] for arm in arms])


def write_table() -> None:
    jobs = study.jobs()
    require_done(jobs)
    results = read_results(jobs[0].folder / "results.json")
    base = results["stages"][study.base]["metrics"]["overall"]
    commits = " and ".join(sorted(commits_of(jobs)))
    device = read_json(jobs[0].folder / "provenance.json")["device"]
    levels = [f"KL {level} nats a token" for level in KL_LEVELS]
    lines = [
        "# The sign experiment: what each reward does to janus_tiny on `shapes`",
        "",
        f"`python experiments/iris_shapes/run.py` at {commits}, {device} a job: {len(ARMS)} arms x {len(study.seeds)} "
        f"seeds ({', '.join(map(str, study.seeds))}), {results['steps']} optimizer steps each, "
        f"{results['benchmark']['n_prompts']} test prompts x {results['benchmark']['samples_per_prompt']} images per "
        "stage, strict accuracy with a plan, in points.",
        f"Base with a plan, seed 0: {100 * base['mean']:.1f} % [{100 * base['low']:.1f}, {100 * base['high']:.1f}].",
        "",
        "The six rewards differ in nothing but the reward. `gentle`: a tenth of the learning rate (1e-5). `both`: "
        "image tokens trained too (`method.image_loss_weight=1`, as the paper does). `released`: `variant=released`, "
        "the settings of IRIS's released code (both trained, one mean over all tokens with log V kept, a token mean "
        "per prompt, half of a linear decay).",
        "",
        "95 % intervals by a two-level bootstrap (seeds, then prompts), which understates the spread over three seeds; "
        "`overall, Student` and all other tables: Student's interval over seeds, which is wide with three. Bold: "
        "excludes zero. No correction for the number of cells.",
        "",
        "## Trained minus base",
        "",
        *base_table(list(ARMS)),
        "## Trained minus the random control at the same learning rate (same seeds, same prompts)",
        "",
        *control_table(),
        "## What moves inside",
        "",
        "Last five rollouts minus first five; diversity from the evaluation.",
        "",
        *inside_table(list(ARMS)),
        "## At equal distance from the base",
        "",
        "Strict accuracy on the training rollouts (64 images a step, means of five steps) when the plans' KL to the "
        f"base first reaches a level, less that of `{CONTROL} gentle` at the same steps (all arms meet the same "
        "prompts in the same order).",
        "",
        *markdown(["reward", *levels], [[arm, *(at_kl(arm, level) for level in KL_LEVELS)] for arm in ARMS]),
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
        curves = {
            name: np.stack([smooth(column(arm, seed, name)) for seed in study.seeds]) for name in (*panels, "text/kl")
        }
        for axis, name in zip(axes.flat, panels, strict=False):
            series = curves[name]
            axis.plot(series.mean(axis=0), label=arm, **style)
            axis.fill_between(
                range(series.shape[1]), series.min(axis=0), series.max(axis=0), alpha=0.1, color=style["color"]
            )
        kl, accuracy = (curves[name].mean(axis=0) for name in ("text/kl", "watch/oracle"))
        axes.flat[-1].plot(np.maximum(kl, 1e-4), accuracy, **style)
    for axis, name in zip(axes.flat, panels, strict=False):
        axis.set(title=name, xlabel="step (mean of five; band: least and most over seeds)")
    axes.flat[-1].set(title="watch/oracle against the plans' KL", xlabel="text/kl, nats a token", xscale="log")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))
    save_figure(figure, HERE / "figure.png")


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="these alone; prints their rows, writes no table")
    options = parser.parse_args()
    if not options.only_table:
        study.run(options.workers, options.arms)
    if options.arms:
        require_done(study.jobs(options.arms))
        print("\n".join([*base_table(options.arms), *inside_table(options.arms)]))
    else:
        write_table()
        write_figure()


if __name__ == "__main__":
    in_one_line(main)
