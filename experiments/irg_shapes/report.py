"""IRG's ladder as tables and pictures, from finished jobs."""

import csv
from pathlib import Path

import arms
import matplotlib
import numpy as np
from arms import (
    ARMS,
    CONTEXTS,
    FIRST_STAGE,
    GRPO_STEPS,
    LONG,
    LONG_BATCH,
    LONGER,
    SCALES,
    SEEDS,
    STEPS,
    TOLD,
    done,
    folder,
    guidance,
)
from PIL import Image

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.diversity import diversity_by_prompt
from t2i_rl.evaluation.records import image_path, read_results, read_stage
from t2i_rl.evaluation.report.grid import FRAME, RIGHT, WRONG, caption_grid, first_of_each_task
from t2i_rl.evaluation.stats import bracket, compare_over_seeds, seed_interval
from t2i_rl.evaluation.tables import excludes_zero
from t2i_rl.methods.irg.evaluation import reflection_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# no stages of a run, but made from its first pictures, two a prompt
BEST_OF_TWO, ANOTHER, WHERE_WRONG, WHERE_FLAGGED = "best of two", "another first picture", "another where wrong", "another where R2 finds fault"  # fmt: skip
METRICS = ("overall", *(f"task/{task}" for task in TASKS), "held_out", "lenient", "malformed")
DID = ("mends", "mends, flagged", "mends, passed", "breaks", "names_defect", "flags", "false_alarms", "unfinished")


def records(arm: str, stage: str) -> list[list[dict]]:
    made = {BEST_OF_TWO: best_of_two, ANOTHER: another, WHERE_WRONG: another_where_wrong}
    if stage in made:
        return [made[stage](rows) for rows in records(arm, "trained_turn1")]
    if stage == WHERE_FLAGGED:
        return [another_where_flagged(*both) for both in zip(records(arm, "trained_turn1"), records(arm, "trained_turn2"), strict=True)]  # fmt: skip
    return [list(read_stage(folder(arm, seed), stage).values()) for seed in SEEDS]


def best_of_two(first: list[dict]) -> list[dict]:
    """The control of a choice between two turns: of a prompt's two first pictures the one that the recogniser prefers, in the place of both."""
    best: dict[str, dict] = {}
    for row in first:
        best[row["prompt_id"]] = max(row, best.get(row["prompt_id"], row), key=lambda each: each["judge_score"])
    return [{**best[row["prompt_id"]], "sample_index": row["sample_index"]} for row in first]


def key(row: dict) -> tuple[str, int]:
    return row["prompt_id"], row["sample_index"]


def another(first: list[dict]) -> list[dict]:
    """Every first picture's twin in its place."""
    return [{**row, "sample_index": 1 - row["sample_index"]} for row in first]


def another_where_wrong(first: list[dict]) -> list[dict]:
    """The control of mending what the oracle finds wrong: drawing it once more from the prompt."""
    twins = {key(row): row for row in another(first)}
    return [row if row["strict"] else twins[key(row)] for row in first]


def another_where_flagged(first: list[dict], second: list[dict]) -> list[dict]:
    """The control of mending what the model's own reflections find wrong: drawing that once more from the prompt."""
    twins, stops = {key(row): row for row in another(first)}, {key(row): row["says_stop"] for row in second}
    return [row if stops[key(row)] else twins[key(row)] for row in first]


def cell(values: dict, scale: float = 100, digits: int = 1) -> str:
    """`+3.1 [+1.0, +5.2]`, bold where the interval excludes zero."""
    form = f"+.{digits}f"
    text = f"{scale * values['difference']:{form}} {bracket(values, form, scale)}"
    return f"**{text}**" if excludes_zero(values) else text


def share(values: list[float], scale: float = 100, digits: int = 1) -> str:
    """Mean over seeds with Student's 95 % interval."""
    over = seed_interval(values, (0.0, 1.0)) if scale == 100 else seed_interval(values)
    return f"{scale * over['mean']:.{digits}f} {bracket(over, f'.{digits}f', scale)}"


def student(values: list[float]) -> dict:
    over = seed_interval(values)
    return {"difference": over["mean"], **over}


def paired(before: list[list[dict]], after: list[list[dict]]) -> dict:
    """Every metric's paired difference over seeds; `overall` by Student's interval over seeds too."""
    pairs = list(zip(before, after, strict=True))
    by_seed = [compare_over_seeds([pair])["overall"]["difference"] for pair in pairs]
    return {**compare_over_seeds(pairs), "overall, Student": student(by_seed)}


def overall(rows: list[dict]) -> float:
    """Strict accuracy, the unweighted mean over tasks."""
    return float(np.mean([np.mean([row["strict"] for row in rows if row["tag"] == task]) for task in TASKS]))


def strict(arm: str, stage: str) -> str:
    """Strict accuracy over seeds."""
    return share([overall(rows) for rows in records(arm, stage)])


def diversity(arm: str, stage: str) -> str:
    if stage in (BEST_OF_TWO, WHERE_WRONG, WHERE_FLAGGED):
        return ""
    found = []
    for seed in SEEDS:
        place = folder(arm, seed)
        ids = [record["prompt_id"] for record in read_stage(place, stage).values()]
        found.append(
            float(diversity_by_prompt(np.load(place / "evaluation" / stage / "features.npy"), ids)["diversity"].mean())
        )
    return share(found, 1, 3)


def did(arm: str, before: str, after: str) -> dict[str, str]:
    """What the reflections between two turns did, and what they cost; empty where there was none to ask."""
    reflected = "trained_turn2" if after == ANOTHER else after
    both = list(zip(records(arm, before), records(arm, after), records(arm, reflected), strict=True))
    seeds = [reflection_metrics(a, b, resamples=2) | mends_by_verdict(a, b, verdicts) for a, b, verdicts in both]
    found = {name: share([each[name]["mean"] for each in seeds]) if all(name in each for each in seeds) else "" for name in DID}  # fmt: skip
    for name, digits in (("text_tokens", 1), ("seconds", 2)):
        found[name] = share([float(np.mean([row[name] for row in b])) for _, b, _ in both], 1, digits)
    return found


def mends_by_verdict(before: list[dict], after: list[dict], verdicts: list[dict]) -> dict[str, dict]:
    """Of the wrong pictures in which the reflection names a fault, and of those in which it names none, the share that is right after."""
    named, wrong = {key(row): bool(row["named"]) for row in verdicts}, {key(row) for row in before if not row["strict"]}
    halves = {name: [row["strict"] for row in after if key(row) in wrong and named[key(row)] == flagged] for name, flagged in (("mends, flagged", True), ("mends, passed", False))}  # fmt: skip
    return {name: {"mean": float(np.mean(half))} for name, half in halves.items() if half}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


TRAINED = {
    "trajectories": "trajectories",
    "long": "trajectories, none twice",
    "six": "six modes",
}
KEPT = "I1 kept where R2 finds nothing wrong, else"
LADDER = (
    ("base, direct", "good", "base_direct"),
    ("base, with a plan", "good", "base_plan"),
    ("good pictures only: I1", "good", "trained_turn1"),
    *(
        (f"{name}: {what}", arm, stage)
        for arm, name in TRAINED.items()
        for what, stage in (
            ("I1", "trained_turn1"),
            ("I2", "trained_turn2"),
            (f"{KEPT} I2", "trained_stopped"),
            (f"{KEPT} another I1 (control)", WHERE_FLAGGED),
            ("of I1 and I2 the one that a recogniser prefers", "trained_chosen"),
            ("of two I1 the one that a recogniser prefers (control)", BEST_OF_TWO),
        )
    ),
    ("six modes, reflections told by the world: I2", "told_world", "trained_turn2"),
    (f"six modes, reflections told by the world: {KEPT} I2", "told_world", "trained_stopped"),
    ("six modes: I1 kept where the oracle finds nothing wrong, else another I1 (control)", "told_world", WHERE_WRONG),
    ("six modes, told of another prompt's picture (control): I2", "told_another", "trained_turn2"),
    ("six modes, told that nothing is wrong (control): I2", "told_stop", "trained_turn2"),
    ("six modes, plans told by the world: I1", "told_plan", "trained_turn1"),
    ("six modes, plans told by the world: I2", "told_plan", "trained_turn2"),
    ("trajectories, none twice, reflections told by the world: I2", "long_told_world", "trained_turn2"),
    (f"trajectories, none twice, reflections told by the world: {KEPT} I2", "long_told_world", "trained_stopped"),
    (
        "trajectories, none twice: I1 kept where the oracle finds nothing wrong, else another I1 (control)",
        "long_told_world",
        WHERE_WRONG,
    ),
    ("trajectories, none twice, told of another prompt's picture (control): I2", "long_told_another", "trained_turn2"),
    ("six modes, texts at temperature 1, as GRPO has them: I1", "grpo", "base_turn1"),
    ("the same: I2", "grpo", "base_turn2"),
    ("+ GRPO on I2: I1", "grpo", "trained_turn1"),
    ("+ GRPO on I2: I2", "grpo", "trained_turn2"),
    ("+ GRPO, random reward (control): I2", "grpo_random", "trained_turn2"),
)
ROUND_STAGES = {f"round {turn}": f"turn{turn}" for turn in (1, 2, 3, 4)} | {"the first picture that R finds nothing wrong with, else the last": "stopped"}  # fmt: skip
PAIRS = (
    ("good pictures: I1 - base with a plan", ("good", "base_plan"), ("good", "trained_turn1")),
    ("good pictures: I1 - base direct", ("good", "base_direct"), ("good", "trained_turn1")),
    *(
        (f"{name}: {what}", ("good" if before.startswith("base") else arm, before), (arm, after))
        for arm, name in TRAINED.items()
        for what, before, after in (
            ("I1 - base with a plan", "base_plan", "trained_turn1"),
            ("I1 - base direct", "base_direct", "trained_turn1"),
            ("I2 - base with a plan", "base_plan", "trained_turn2"),
            ("I2 - I1", "trained_turn1", "trained_turn2"),
            ("kept or I2 - I1", "trained_turn1", "trained_stopped"),
            ("kept or another I1 - I1 (control)", "trained_turn1", WHERE_FLAGGED),
            ("kept or I2 - kept or another I1", WHERE_FLAGGED, "trained_stopped"),
            ("chosen of I1 and I2 - I1", "trained_turn1", "trained_chosen"),
            ("chosen of two I1 - I1 (control)", "trained_turn1", BEST_OF_TWO),
            ("chosen of I1 and I2 - chosen of two I1", BEST_OF_TWO, "trained_chosen"),
        )
    ),
    ("six modes' I1 - good pictures' (equal steps, fewer first pictures)", ("good", "trained_turn1"), ("six", "trained_turn1")),
    ("six modes - trajectories, I1", ("trajectories", "trained_turn1"), ("six", "trained_turn1")),
    ("six modes - trajectories, I2", ("trajectories", "trained_turn2"), ("six", "trained_turn2")),
    ("trajectories: none twice - most twice, I1", ("trajectories", "trained_turn1"), ("long", "trained_turn1")),
    ("trajectories: none twice - most twice, I2", ("trajectories", "trained_turn2"), ("long", "trained_turn2")),
    ("six modes, told by the world: I2 - I1", ("told_world", "trained_turn1"), ("told_world", "trained_turn2")),
    ("six modes, told by the world: kept or I2 - I1", ("told_world", "trained_turn1"), ("told_world", "trained_stopped")),
    ("six modes: another I1 where the oracle finds fault - I1 (control)", ("told_world", "trained_turn1"), ("told_world", WHERE_WRONG)),
    ("six modes, told by the world: kept or I2 - another I1 where the oracle finds fault", ("told_world", WHERE_WRONG), ("told_world", "trained_stopped")),
    ("trajectories, none twice, told by the world: I2 - I1", ("long_told_world", "trained_turn1"), ("long_told_world", "trained_turn2")),
    ("trajectories, none twice, told by the world: kept or I2 - I1", ("long_told_world", "trained_turn1"), ("long_told_world", "trained_stopped")),
    ("trajectories, none twice, told by the world: kept or I2 - another I1 where the oracle finds fault", ("long_told_world", WHERE_WRONG), ("long_told_world", "trained_stopped")),
    ("six modes, told of another prompt's picture: I2 - I1", ("told_another", "trained_turn1"), ("told_another", "trained_turn2")),
    ("six modes, told that nothing is wrong: I2 - I1", ("told_stop", "trained_turn1"), ("told_stop", "trained_turn2")),
    ("six modes: I1 of the world's plans - I1 of its own", ("six", "trained_turn1"), ("told_plan", "trained_turn1")),
    ("six modes, told by the world: I2 - I1 of the world's plans", ("told_plan", "trained_turn1"), ("told_world", "trained_turn2")),
    ("GRPO's I2 - the same before it", ("grpo", "base_turn2"), ("grpo", "trained_turn2")),
    ("GRPO's I1 - the same before it", ("grpo", "base_turn1"), ("grpo", "trained_turn1")),
    ("GRPO's I2 - its random control's I2", ("grpo_random", "trained_turn2"), ("grpo", "trained_turn2")),
)  # fmt: skip


def context_table(arm: str) -> list[str]:
    """The level of the whole context, then what each change of it costs, paired by seed."""
    found = [read_json(folder(arm, seed) / "results.json")["nats"] for seed in SEEDS]
    whole, *changed = found[0]
    columns = list(found[0][whole])
    costs = {name: [cell(student([each[name][column] - each[whole][column] for each in found]), 1, 3) if column in found[0][name] else "" for column in columns] for name in changed}  # fmt: skip
    rows = [[whole, *(share([each[whole][column] for each in found], 1, 3) for column in columns)], *([f"{name}: more by", *cells] for name, cells in costs.items())]  # fmt: skip
    return table(["", *columns], rows)


def write_table() -> None:
    every = (*arms.LADDER, *LONGER)
    lacking = [arm for arm in every if not done(arm)]
    jobs = [read_json(folder(arm, seed) / "job.json") for arm in every if done(arm) for seed in SEEDS]
    commits = " and ".join(dict.fromkeys(job["commit"][:7] for job in jobs))
    device = read_json(folder("good", 0) / "provenance.json")["device"]
    results = read_results(folder("good", 0) / "results.json")
    manifest = read_json(arms.DATA / "janus_tiny_4096_seed0" / "manifest.json")
    short = ("overall", "overall, Student", *METRICS[1:])
    differences = {
        name: paired(records(*before), records(*after)) for name, before, after in PAIRS if done(before[0], after[0])
    }
    reflected = {
        **{name: did(arm, "trained_turn1", "trained_turn2") for arm, name in TRAINED.items() if done(arm)},
        **{f"{name}, another I1 in place of I2 (control)": did(arm, "trained_turn1", ANOTHER) for arm, name in TRAINED.items() if done(arm)},
        **{
            name: did(arm, f"trained_turn{turn}", f"trained_turn{turn + 1}")
            for name, arm, turn in (
                ("six modes, told by the world", "told_world", 1),
                ("trajectories, none twice, told by the world", "long_told_world", 1),
                ("six modes, told of another prompt's picture (control)", "told_another", 1),
                ("six modes, told that nothing is wrong (control)", "told_stop", 1),
                ("six modes, plans told by the world", "told_plan", 1),
                ("six modes, third round", "rounds", 2),
                ("six modes, fourth round", "rounds", 3),
                ("+ GRPO", "grpo", 1),
            )
            if done(arm)
        },
    }  # fmt: skip
    sweep = [
        [*(f"{scale:g}" for scale in scales), strict(name, "trained_turn1"), strict(name, "trained_turn2"), cell(paired(records(name, "trained_turn1"), records(name, "trained_turn2"))["overall"])]
        for scales, name in ((scales, guidance(scales)) for scales in SCALES)
        if done(name)
    ]  # fmt: skip
    lines = [
        "# IRG's ladder on `shapes`",
        "",
        f"`python experiments/irg_shapes/run.py` at {commits}, {device}, one thread a job: seeds {', '.join(map(str, SEEDS))}, {STEPS} optimizer steps of 16 "
        f"trajectories on the data of 4,096 prompts (six modes: {FIRST_STAGE} of stage 1, then {STEPS - FIRST_STAGE} of stage 2), GRPO {GRPO_STEPS} steps of 64; "
        f"{results['benchmark']['n_prompts']} test prompts x {results['benchmark']['samples_per_prompt']} trajectories, strict accuracy in percent.",
        *([f"\"none twice\" (`--arms {' '.join(arm for arm in LONGER if done(arm))}`): {LONG:,} steps of {LONG_BATCH} on the data of {arms.PROMPTS:,} prompts, {read_json(folder('long', 0) / 'provenance.json')['device']}."] if done("long") else []),
        *([f"Not run yet, and left out: {', '.join(lacking)}."] if lacking else []),
        f"Data of seed 0: {', '.join(f'{count} rows of {mode}' for mode, count in manifest['counts'].items())}.",
        "",
        "Intervals of levels and of what reflections did: Student's over three seeds, which is wide. Differences: paired trajectory by trajectory, two-level bootstrap "
        "(seeds, then prompts), which understates the spread over three seeds; `overall, Student` over seeds alone. Bold: excludes zero. No correction for the number of cells.",
        "",
        "I1, I2: the first and the second picture; R2: the reflection between them. A control draws another first picture of the same prompt in the place of I2, by the same weights. I1 is "
        "guided by 3 against the unconditional, I2 by 2. `told by the world`: the reflections are those that the data has, the oracle's truth with a remedy and a plan.",
        "",
        "## The ladder",
        "",
        *table(["", "overall", "diversity"], [[name, strict(arm, stage), diversity(arm, stage)] for name, arm, stage in LADDER if done(arm)]),
        "## Paired differences, in points",
        "",
        *table(["", *(name.removeprefix("task/") for name in short)], [[name, *(cell(found[metric]) for metric in short)] for name, found in differences.items()]),
        "## What reflections did",
        "",
        "`mends`: of the wrong pictures before, the share that is right after. `breaks`: of the right ones, the share that is wrong after. `names_defect`: of the wrong "
        "ones, the share whose reflection has one of the oracle's own phrases for what is wrong, place included; `flags`: any, true or not; `mends, flagged` and `mends, passed`: the wrong ones with and without a flag apart. `false_alarms`: of the right ones, the share whose reflection names a "
        "fault. Seconds: a picture with its text, in batches of 64 on one thread, beside other work of the machine (`none twice`: on the GPU): no benchmark.",
        "",
        *table(["", *DID, "text_tokens", "seconds"], [[name, *found.values()] for name, found in reflected.items()]),
        "## What the second picture is drawn from, in nats a token",
        "",
        "Cross-entropy of second pictures and reflections of data that the run has not seen (rows of another seed's data), and how much more where what they follow is changed. "
        "Where the first picture is right the second one is the same, code for code: copying would bring it to 0.",
        "",
        *(line for arm, trained in CONTEXTS.items() if done(arm) for line in (f"{TRAINED[trained].capitalize()}:", "", *context_table(arm))),
        "## Rounds (six modes; later rounds see the window that training has)",
        "",
        *table(["", "overall"], [[name, strict("rounds", f"trained_{stage}")] for name, stage in ROUND_STAGES.items() if done("rounds")]),
        "## Guidance of the second picture (six modes; 108 validation prompts)",
        "",
        *table(["against the context without reflection", "without pictures", "unconditional", "I1", "I2", "I2 - I1"], sweep),
    ]  # fmt: skip
    write_atomic(HERE / "table.md", "\n".join(lines))
    print(f"wrote {HERE / 'table.md'}")


def column(arm: str, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged metric."""
    with (folder(arm, seed) / "metrics.csv").open() as rows:
        kept = [(float(row["step"]), float(row[name])) for row in csv.DictReader(rows) if row.get(name)]
    return tuple(np.array(kept).T)


def write_figure() -> None:
    """Levels of the ladder, and what the validation prompts showed while training."""
    figure, axes = plt.subplots(1, 3, figsize=(19, 6), width_ratios=(1, 1.2, 1.2), constrained_layout=True)
    shown = [row for row in reversed(LADDER) if done(row[1])]
    colors = plt.get_cmap("tab20").colors
    for place, (_, arm, stage) in enumerate(shown):
        values = [100 * overall(rows) for rows in records(arm, stage)]
        axes[0].plot(
            values, [place] * len(values), "o", color=colors[[*ARMS, *TOLD].index(arm) % len(colors)], alpha=0.8
        )
    axes[0].set_yticks(range(len(shown)), [name for name, _, _ in shown], fontsize=7)
    axes[0].set(title="strict accuracy, a dot a seed", xlabel="percent", xlim=(0, 100))
    axes[0].grid(axis="x", alpha=0.3)
    for axis, names, title in ((axes[1], ("text/loss", "image/loss"), "cross-entropy, nats a token (means of 20 steps)"), (axes[2], ("val/turn1", "val/turn2", "val/names_defect", "val/false_alarms"), "validation prompts while training")):  # fmt: skip
        for arm, style in ((arm, style) for arm, style in (("trajectories", "--"), ("stage1", ":"), ("six", "-")) if done(arm)):  # fmt: skip
            for number, name in enumerate(names):
                found = [column(arm, seed, name) for seed in SEEDS]
                width = min(20, len(found[0][0])) if axis is axes[1] else 1
                mean = np.convolve(
                    np.mean([values for _, values in found], axis=0), np.ones(width) / width, mode="valid"
                )
                offset = FIRST_STAGE if arm == "six" else 0
                axis.plot(found[0][0][width - 1 :] + offset, mean, style, color=f"C{number}", label=f"{arm}: {name}")
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=6)
    figure.savefig(HERE / "figure.png", dpi=100)
    print(f"wrote {HERE / 'figure.png'}")


def write_strips() -> None:
    """The first two test prompts of each task, seed 0, chosen without looking: I1 and I2 with what was thought before them."""
    place = folder("six", SEEDS[0])
    first, second = (read_stage(place, stage) for stage in ("trained_turn1", "trained_turn2"))
    images, captions, frames = [], [], []
    for key in first_of_each_task(list(first.values()), 2):
        for name, stage, rows in (("I1", "trained_turn1", first), ("I2", "trained_turn2", second)):
            images.append(np.asarray(Image.open(image_path(place, stage, rows[key])).convert("RGB")))
            captions.append(
                f"{name}: {rows[key]['prompt']}\n{rows[key]['plan']}"
                if name == "I1"
                else f"{name}\n{rows[key]['plan']}"
            )
            frames.append({True: RIGHT, False: WRONG}.get(rows[key]["strict"], FRAME))
    caption_grid(images, captions, 4, 6, frames).save(HERE / "strips.png")
    print(f"wrote {HERE / 'strips.png'}")
