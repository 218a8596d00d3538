"""IRG's ladder as tables, from finished jobs."""

from pathlib import Path

import numpy as np
from arms import (
    CONTEXTS,
    FIRST_STAGE,
    GRPO_STEPS,
    LADDER,
    LONG,
    LONG_BATCH,
    LONGER,
    MORE_PROMPTS,
    PROMPTS,
    SCALES,
    SEEDS,
    STEPS,
    data,
    done,
    guidance,
    jobs,
    study,
)
from controls import ANOTHER, BEST_OF_TWO, WHERE_FLAGGED, WHERE_WRONG, key, records
from rows import I1, I2, PAIRS, REFLECTIONS, ROUNDS, TRAINED
from rows import LADDER as LADDER_ROWS

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.records import read_results
from t2i_rl.evaluation.stats import seed_difference
from t2i_rl.methods.irg.evaluation import reflection_metrics
from t2i_rl.study.arms import STUDENT, differences
from t2i_rl.study.jobs import commits_of, require_done
from t2i_rl.study.tables import difference_cell, markdown, mean_cell, metric_cells, metric_names, share_cell

HERE = Path(__file__).parent
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METRICS = ("overall", STUDENT, *(f"task/{task}" for task in TASKS), "held_out", "lenient", "malformed")
DID = ("mends", "mends, flagged", "mends, passed", "breaks", "names_defect", "flags", "false_alarms", "unfinished")


def overall(rows: list[dict]) -> float:
    """Strict accuracy, the unweighted mean over tasks."""
    return float(np.mean([np.mean([row["strict"] for row in rows if row["tag"] == task]) for task in TASKS]))


def strict_cell(arm: str, stage: str) -> str:
    """Strict accuracy over seeds."""
    return share_cell([overall(rows) for rows in records(arm, stage)])


def diversity_cell(arm: str, stage: str) -> str:
    return "" if stage in (BEST_OF_TWO, WHERE_WRONG, WHERE_FLAGGED) else mean_cell(study.diversity(arm, stage), ".3f")


def ladder_table() -> list[str]:
    rows = [
        [name, strict_cell(arm, stage), diversity_cell(arm, stage)] for name, arm, stage in LADDER_ROWS if done(arm)
    ]
    return markdown(["", "overall", "diversity"], rows)


def pairs_table() -> list[str]:
    pairs = [(name, before, after) for name, before, after in PAIRS if done(before[0], after[0])]
    rows = [
        [name, *metric_cells(differences(records(*before), records(*after)), METRICS)] for name, before, after in pairs
    ]
    return markdown(["", *metric_names(METRICS)], rows)


def reflections_table() -> list[str]:
    rows = [[name, *reflection_cells(arm, before, after)] for name, arm, before, after in REFLECTIONS if done(arm)]
    return markdown(["", *DID, "text_tokens", "seconds"], rows)


def reflection_cells(arm: str, before: str, after: str) -> list[str]:
    """What the reflections between two turns did, and what they cost; empty where there was none to ask."""
    second = records(arm, after)
    verdicts = records(arm, I2) if after == ANOTHER else second
    metrics = [
        reflection_metrics(a, b, resamples=2) | mends_by_verdict(a, b, reflected)
        for a, b, reflected in zip(records(arm, before), second, verdicts, strict=True)
    ]
    measured = [
        share_cell([by_name[name]["mean"] for by_name in metrics])
        if all(name in by_name for by_name in metrics)
        else ""
        for name in DID
    ]
    tokens, seconds = (
        [float(np.mean([row[name] for row in rows])) for rows in second] for name in ("text_tokens", "seconds")
    )
    return [*measured, mean_cell(tokens, ".1f"), mean_cell(seconds, ".2f")]


def mends_by_verdict(before: list[dict], after: list[dict], verdicts: list[dict]) -> dict[str, dict]:
    """Of the wrong pictures, the share that is right after, apart by whether the reflection names a fault."""
    named, wrong = {key(row): bool(row["named"]) for row in verdicts}, {key(row) for row in before if not row["strict"]}
    halves = {
        name: [row["strict"] for row in after if key(row) in wrong and named[key(row)] == flagged]
        for name, flagged in (("mends, flagged", True), ("mends, passed", False))
    }
    return {name: {"mean": float(np.mean(half))} for name, half in halves.items() if half}


def context_table(arm: str) -> list[str]:
    """The level of the whole context, then what each change of it costs, paired by seed."""
    nats = [read_json(study.run_folder(arm, seed) / "results.json")["nats"] for seed in SEEDS]
    whole, *changes = nats[0]
    columns = list(nats[0][whole])

    def cost_cell(change: str, column: str) -> str:
        if column not in nats[0][change]:
            return ""
        costs = [by_context[change][column] - by_context[whole][column] for by_context in nats]
        return difference_cell(seed_difference(costs), scale=1, digits=3)

    levels = [mean_cell([by_context[whole][column] for by_context in nats], ".3f") for column in columns]
    costs = [[f"{change}: more by", *(cost_cell(change, column) for column in columns)] for change in changes]
    return markdown(["", *columns], [[whole, *levels], *costs])


def guidance_table() -> list[str]:
    rows = []
    for scales in SCALES:
        arm = guidance(scales)
        if done(arm):
            change = differences(records(arm, I1), records(arm, I2))["overall"]
            levels = [strict_cell(arm, stage) for stage in (I1, I2)]
            rows.append([*(f"{scale:g}" for scale in scales), *levels, difference_cell(change)])
    head = ["against the context without reflection", "without pictures", "unconditional", "I1", "I2", "I2 - I1"]
    return markdown(head, rows)


def about() -> list[str]:
    """What ran, on which data, and what has not run."""
    every = (*LADDER, *LONGER)
    finished, lacking = [arm for arm in every if done(arm)], [arm for arm in every if not done(arm)]
    first = study.run_folder("good", SEEDS[0])
    device, benchmark = (
        read_json(first / "provenance.json")["device"],
        read_results(first / "results.json")["benchmark"],
    )
    counts = read_json(data(SEEDS[0], PROMPTS) / "manifest.json")["counts"]
    lines = [
        f"`python experiments/irg_shapes/run.py` at {' and '.join(commits_of(jobs(finished)))}, {device}, one thread a "
        f"job: seeds {', '.join(map(str, SEEDS))}, {STEPS} optimizer steps of 16 trajectories on the data of "
        f"{PROMPTS:,} prompts (six modes: {FIRST_STAGE} of stage 1, then {STEPS - FIRST_STAGE} of stage 2), GRPO "
        f"{GRPO_STEPS} steps of 64; {benchmark['n_prompts']} test prompts x {benchmark['samples_per_prompt']} "
        "trajectories, strict accuracy in percent.",
    ]
    if "long" in finished:
        longer = " ".join(arm for arm in LONGER if arm in finished)
        gpu = read_json(study.run_folder("long", SEEDS[0]) / "provenance.json")["device"]
        lines.append(
            f'"none twice" (`--arms {longer}`): {LONG:,} steps of {LONG_BATCH} on the data of {MORE_PROMPTS:,} '
            f"prompts, {gpu}."
        )
    if lacking:
        lines.append(f"Not run yet, and left out: {', '.join(lacking)}.")
    rows = ", ".join(f"{count} rows of {mode}" for mode, count in counts.items())
    return [*lines, f"Data of seed {SEEDS[0]}: {rows}."]


def write_table() -> None:
    require_done(jobs([arm for arm in (*LADDER, *LONGER) if arm in ("good", "six") or done(arm)]))
    contexts = [(arm, TRAINED[trained]) for arm, trained in CONTEXTS.items() if done(arm)]
    rounds = [[name, strict_cell("rounds", stage)] for name, stage in ROUNDS.items() if done("rounds")]
    lines = [
        "# IRG's ladder on `shapes`",
        "",
        *about(),
        "",
        "Intervals of levels and of what reflections did: Student's over three seeds, which is wide. Differences: "
        "paired trajectory by trajectory, two-level bootstrap (seeds, then prompts), which understates the spread over "
        "three seeds; `overall, Student` over seeds alone. Bold: excludes zero. No correction for the number of cells.",
        "",
        "I1, I2: the first and the second picture; R2: the reflection between them. A control draws another first "
        "picture of the same prompt in the place of I2, by the same weights. I1 is guided by 3 against the "
        "unconditional, I2 by 2. `told by the world`: the reflections are those that the data has, the oracle's truth "
        "with a remedy and a plan.",
        "",
        "## The ladder",
        "",
        *ladder_table(),
        "## Paired differences, in points",
        "",
        *pairs_table(),
        "## What reflections did",
        "",
        "`mends`: of the wrong pictures before, the share that is right after. `breaks`: of the right ones, the share "
        "that is wrong after. `names_defect`: of the wrong ones, the share whose reflection has one of the oracle's "
        "own phrases for what is wrong, place included; `flags`: any, true or not; `mends, flagged` and `mends, "
        "passed`: the wrong ones with and without a flag apart. `false_alarms`: of the right ones, the share whose "
        "reflection names a fault. Seconds: a picture with its text, in batches of 64 on one thread, beside other work "
        "of the machine (`none twice`: on the GPU): no benchmark.",
        "",
        *reflections_table(),
        "## What the second picture is drawn from, in nats a token",
        "",
        "Cross-entropy of second pictures and reflections of data that the run has not seen (rows of another seed's "
        "data), and how much more where what they follow is changed. Where the first picture is right the second one "
        "is the same, code for code: copying would bring it to 0.",
        "",
        *(line for arm, name in contexts for line in (f"{name.capitalize()}:", "", *context_table(arm))),
        "## Rounds (six modes; later rounds see the window that training has)",
        "",
        *markdown(["", "overall"], rounds),
        "## Guidance of the second picture (six modes; 108 validation prompts)",
        "",
        *guidance_table(),
    ]
    write_atomic(HERE / "table.md", "\n".join(lines))
    print(f"wrote {HERE / 'table.md'}")
