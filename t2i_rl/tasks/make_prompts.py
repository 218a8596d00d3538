"""`task=make_prompts`: annotated training prompts, written to a file that `data=t2i_r1` and `data=prompts` read."""

import json
from collections import Counter
from pathlib import Path

from rich.console import Console

from t2i_rl.data.make_prompts import make_prompts
from t2i_rl.data.t2i_r1 import plain
from t2i_rl.errors import UserError
from t2i_rl.evaluation.results import write_atomic
from t2i_rl.prompts import read_prompts


def run(cfg) -> dict:
    """Write `cfg.task.per_kind` prompts of each of `cfg.task.kinds`, none of them in the file `cfg.task.exclude`."""
    task, out = cfg.task, Path(cfg.task.out or Path(cfg.paths.output_dir) / "prompts.jsonl")
    barred = {plain(prompt.text) for prompt in read_prompts(task.exclude)} if task.exclude else set()
    rows = make_prompts(list(task.kinds), task.per_kind, cfg.seed, frozenset(barred))
    if not out.parent.is_dir():
        raise UserError(f"task.out={out}: there is no folder {out.parent}")
    write_atomic(out, "".join(json.dumps(row) + "\n" for row in rows))
    counts = Counter(row["tag"] for row in rows)
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    Console().print(f"{len(rows)} prompts ({listed}) in {out}", soft_wrap=True)
    return {"prompts": len(rows), "file": str(out)}
