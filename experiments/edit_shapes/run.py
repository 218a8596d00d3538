"""FlowEdit on sd3_tiny without and with soft tokens: recolour, add and remove an object of `shapes`.

Judged by the oracle and by what should have stayed.

    python experiments/alignment_shapes/run.py --models sd3_tiny    # trains the tokens, three seeds
    python experiments/edit_shapes/run.py                           # what is not done yet, then table.md and the strips

The tokens of seed n edit the pictures of seed n; the untouched model edits the same pictures with the same noise.
"""

import shutil
from pathlib import Path

import numpy as np

from t2i_rl.core.files import read_json, read_json_lines, write_atomic
from t2i_rl.evaluation.stats import compare_values, seed_difference, wilson
from t2i_rl.shapes.edits import KINDS
from t2i_rl.study.arms import Study
from t2i_rl.study.jobs import Job, commits_of, require_done
from t2i_rl.study.queue import run_jobs
from t2i_rl.study.report import in_one_line, study_parser
from t2i_rl.study.tables import difference_cell, markdown

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TRAINED = ROOT / "outputs" / "alignment_shapes" / "sd3_tiny"
CASES = 80  # of each kind of edit and seed
study = Study(
    folder=ROOT / "outputs" / "edit_shapes",
    arms={"untouched": [], "softrepa": [], "agsm": []},
    shared=["task=edit", "model=sd3_tiny", "model.dtype=bfloat16", f"task.cases={CASES}"],
    base=None,
    root=ROOT,
)


def job(arm: str, seed: int) -> Job:
    if arm == "untouched":
        return study.job(arm, seed, result="edits.json")
    tokens = TRAINED / arm / f"seed_{seed}" / "soft_tokens.safetensors"
    return study.job(arm, seed, f"model.soft_tokens={tokens}", result="edits.json", takes=(tokens,))


def jobs() -> list[Job]:
    return [job(arm, seed) for seed in study.seeds for arm in study.arms]


def edits(arm: str, kind: str, name: str) -> np.ndarray:
    """One figure (seeds, cases) of every edit of a kind."""
    values = []
    for seed in study.seeds:
        rows = [row.value for row in read_json_lines(study.run_folder(arm, seed) / "edits.jsonl")]
        values.append([float(row[name]) for row in rows if row["kind"] == kind])
    return np.array(values)


def change_cells(arm: str, kind: str, name: str, scale: float) -> list[str | None]:
    """Paired change against the untouched model: bootstrap over the cases of all seeds, then Student's over seeds."""
    if arm == "untouched":
        return [None, None]
    changes = scale * (edits(arm, kind, name) - edits("untouched", kind, name))
    over_cases = compare_values(changes.flatten(), np.arange(changes.size))
    over_seeds = seed_difference(changes.mean(axis=1).tolist())
    return [difference_cell(difference, scale=1) for difference in (over_cases, over_seeds)]


def row(kind: str, arm: str) -> list[str | None]:
    right = edits(arm, kind, "strict")
    share = wilson(int(right.sum()), right.size)
    as_asked = f"{100 * share['mean']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    kept = f"{edits(arm, kind, 'psnr_kept').mean():.1f}"
    changes = change_cells(arm, kind, "strict", 100), change_cells(arm, kind, "psnr_kept", 1)
    return [kind, arm, as_asked, *changes[0], kept, *changes[1]]


def write_table() -> None:
    require_done(jobs())
    last = study.run_folder("agsm", study.seeds[0])
    settings = ", ".join(f"{name} {value}" for name, value in read_json(last / "edits.json")["flow"].items())
    change = ["change", "change (Student)"]
    lines = [
        "# FlowEdit on `shapes`",
        "",
        f"`python experiments/edit_shapes/run.py` at {' and '.join(commits_of(jobs()))}, sd3_tiny, {settings}: seeds "
        f"{', '.join(map(str, study.seeds))}, {CASES} edits of each kind and seed. As asked: the oracle finds what the "
        "target says and nothing else, percent (Wilson). Kept: PSNR in dB over the pixels that the edit leaves alone "
        "(all but the changed object; where one is added, the object that was there). Changes are paired, same "
        "picture, same noise: bootstrap over cases, then Student's interval over seeds. Bold excludes zero.",
        "",
        *markdown(
            ["edit", "arm", "as asked", *change, "kept, dB", *change],
            [row(kind, arm) for kind in KINDS for arm in study.arms],
            names=2,
        ),
    ]
    write_atomic(HERE / "table.md", "\n".join(lines))
    for kind in KINDS:
        shutil.copy(last / f"{kind}.png", HERE / f"{kind}.png")
    print("\n".join(lines))


def main() -> None:
    options = study_parser(__doc__).parse_args()
    if not options.only_table:
        run_jobs(jobs(), options.workers)
    write_table()


if __name__ == "__main__":
    in_one_line(main)
