"""FlowEdit on sd3_tiny without and with soft tokens: recolour, add and remove an object of `shapes`, judged by the oracle and by what should have stayed.

    python experiments/alignment_shapes/run.py --models sd3_tiny    # trains the tokens, three seeds
    python experiments/edit_shapes/run.py                           # what is not done yet, then table.md and the strips

The tokens of seed n edit the pictures of seed n; the untouched model edits the same pictures with the same noise.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.stats import bracket, percentile_interval, seed_interval
from t2i_rl.evaluation.tables import excludes_zero
from t2i_rl.pretrain.measure import wilson
from t2i_rl.shapes.edits import KINDS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TRAINED, OUTPUTS = ROOT / "outputs" / "alignment_shapes" / "sd3_tiny", ROOT / "outputs" / "edit_shapes"
SEEDS = (0, 1, 2)
ARMS = ("untouched", "softrepa", "agsm")
CASES = 80  # of each kind of edit and seed


def edit(arm: str, seed: int) -> None:
    out = OUTPUTS / arm / f"seed_{seed}"
    result, file = out / "edits.json", TRAINED / arm / f"seed_{seed}" / "soft_tokens.safetensors"
    tokens = [] if arm == "untouched" else [f"model.soft_tokens={file}"]
    if result.exists() and not (tokens and file.stat().st_mtime > result.stat().st_mtime):
        print(f"{arm}, seed {seed}: done before", flush=True)
        return
    command = ["run.py", "task=edit", "model=sd3_tiny", "model.dtype=bfloat16", f"task.cases={CASES}", f"seed={seed}", f"hydra.run.dir={out}"]  # fmt: skip
    subprocess.run(
        [sys.executable, *command, *tokens], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def records(arm: str, kind: str) -> list[list[dict]]:
    """Of each seed, in order of cases."""
    parts = []
    for seed in SEEDS:
        lines = (OUTPUTS / arm / f"seed_{seed}" / "edits.jsonl").read_text().splitlines()
        parts.append([row for row in map(json.loads, lines) if row["kind"] == kind])
    return parts


def changes(arm: str, kind: str, name: str, scale: float) -> str:
    """Paired change against the untouched model: bootstrap over cases, then Student's interval over seeds; bold excludes zero."""
    by_seed = [
        np.array([scale * (float(after[name]) - float(before[name])) for before, after in zip(*pair, strict=True)])
        for pair in zip(records("untouched", kind), records(arm, kind), strict=True)
    ]
    values, rng = np.concatenate(by_seed), np.random.default_rng(0)
    draws = rng.choice(values, (2000, len(values))).mean(axis=1)
    over = seed_interval([float(part.mean()) for part in by_seed])
    shown = []
    for interval in (percentile_interval(draws), over):
        text = f"{values.mean():+.1f} {bracket(interval, '+.1f')}"
        shown.append(f"**{text}**" if excludes_zero(interval) else text)
    return " | ".join(shown)


def write_table() -> None:
    made = read_json(OUTPUTS / "agsm" / "seed_0" / "provenance.json")
    flow = read_json(OUTPUTS / "agsm" / "seed_0" / "edits.json")["flow"]
    settings = ", ".join(f"{name} {value}" for name, value in flow.items())
    lines = [
        "# FlowEdit on `shapes`", "",
        f"`python experiments/edit_shapes/run.py` at {made['git_commit'][:7]}, sd3_tiny, {settings}: seeds {', '.join(map(str, SEEDS))}, "
        f"{CASES} edits of each kind and seed. As asked: the oracle finds what the target says and nothing else, percent (Wilson). Kept: PSNR in dB over the pixels that the edit leaves "
        "alone (all but the changed object; where one is added, the object that was there). Changes are paired, same picture, same noise: bootstrap over cases, then Student's interval over seeds. "
        "Bold excludes zero.", "",
        "| edit | arm | as asked | change | change (Student) | kept, dB | change | change (Student) |", "|---|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for kind in KINDS:
        for arm in ARMS:
            rows = [row for part in records(arm, kind) for row in part]
            right, kept = wilson(sum(row["strict"] for row in rows), len(rows)), np.mean([row["psnr_kept"] for row in rows])  # fmt: skip
            cells = ["|", "|"] if arm == "untouched" else [changes(arm, kind, "strict", 100), changes(arm, kind, "psnr_kept", 1)]  # fmt: skip
            lines.append(
                f"| {kind} | {arm} | {100 * right['mean']:.1f} [{100 * right['low']:.1f}, {100 * right['high']:.1f}] | {cells[0]} | {kept:.1f} | {cells[1]} |"
            )
    write_atomic(HERE / "table.md", "\n".join([*lines, ""]))
    for kind in KINDS:
        shutil.copy(OUTPUTS / "agsm" / "seed_0" / f"{kind}.png", HERE / f"{kind}.png")
    print((HERE / "table.md").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild the table from finished runs")
    if not parser.parse_args().only_table:
        for seed in SEEDS:
            for arm in ARMS:
                edit(arm, seed)
    write_table()
