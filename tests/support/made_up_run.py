"""Made-up runs for tests of statistics, tables and reports: drawn at random, never reported as findings."""

from pathlib import Path

import numpy as np
from PIL import Image

from t2i_rl.core.contracts import Column
from t2i_rl.evaluation.records import write_records, write_results
from t2i_rl.evaluation.stats import aggregate, compare
from t2i_rl.evaluation.tables import row_of
from t2i_rl.shapes.text import GENEVAL_TASKS


def make_records(
    rate: float, seed: int, per_task: int = 10, samples: int = 2, tasks=GENEVAL_TASKS, effect: float = 0.3
):
    """Records whose strict verdicts are Bernoulli(rate + an effect of the prompt, which does not depend on `seed`)."""
    prompt_rng, rng = np.random.default_rng(123), np.random.default_rng(seed)
    records = []
    for tag in tasks:
        for number in range(per_task):
            chance = np.clip(rate + effect * prompt_rng.uniform(-1, 1), 0, 1)
            for sample in range(samples):
                strict = bool(rng.random() < chance)
                length, lenient = 8 + int(rng.integers(5)), strict or bool(rng.random() < 0.3)
                score = 1.0 if strict else float(rng.integers(4)) / 4
                defects = [] if strict else [rng.choice(["malformed shape", "missing circle"]).item()]
                records.append(
                    {
                        "prompt_id": f"{tag}/{number}",
                        "prompt": f"a {tag} <b>{number}</b>",
                        "tag": tag,
                        "seen": number % 2 == 0,
                        "sample_index": sample,
                        "seed": sample,
                        "plan": "one object. a red circle at the top left.",
                        "plan_length": length,
                        "strict": strict,
                        "lenient": lenient,
                        "score": score,
                        "measured": {"malformed": float("malformed shape" in defects)},
                        "defects": defects,
                        "image": f"images/{len(records):05d}.png",
                    }
                )
    return records


def make_run(folder: Path, seed: int = 0, rate: float = 0.8, reward: str = "nsc", per_task: int = 6, **changes) -> Path:
    """A finished run on disk with a base at 0.5 and a trained stage at `rate`; `changes` go into every record."""
    stages = {
        "base_plan": make_records(0.5, seed, per_task),
        "trained_plan": make_records(rate, seed + 100, per_task),
    }
    rng = np.random.default_rng(seed)
    for stage, records in stages.items():
        stage_folder = folder / "evaluation" / stage
        (stage_folder / "images").mkdir(parents=True)
        for record in records:
            record |= changes
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(stage_folder / record["image"])
        write_records(stage_folder / "records.jsonl", records)
    before, after = stages.values()
    changes = compare(before, after)
    results = {
        "task": "train",
        "method": "iris",
        "model": "janus_tiny",
        "reward": reward,
        "seed": seed,
        "steps": 40,
        "benchmark": {"name": "shapes", "version": 1},
        "stages": {stage: {"metrics": aggregate(records)} for stage, records in stages.items()},
        "comparisons": [{"a": "base_plan", "b": "trained_plan", "metrics": changes}],
        "headline": {"a": "base_plan", "b": "trained_plan", **changes["overall"]},
        "columns": {"malformed": row_of(Column("malformed", "malformed images", more_is_better=False))},
        "tables": [],
    }
    write_results(folder / "results.json", results)
    return folder
