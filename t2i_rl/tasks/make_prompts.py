"""`task=make_prompts`: annotated training prompts, written to a file that `data=t2i_r1` and `data=prompts` read."""

import json
from collections import Counter
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import write_atomic
from t2i_rl.core.prompts import read_prompts
from t2i_rl.data.make_prompts import make_prompts


def check(cfg) -> None:
    """Refuse a file that cannot be made.

    Raises:
        UserError: it is there already, or its folder is not.
    """
    out = file_of(cfg)
    if out.exists():
        raise UserError(f"task.out={out} is there already: name another file")
    if not out.parent.is_dir():
        raise UserError(f"task.out={out}: there is no folder {out.parent}")


def file_of(cfg) -> Path:
    """Where the prompts are written."""
    return Path(cfg.task.out or Path(cfg.paths.output_dir) / "prompts.jsonl")


def run(cfg) -> dict:
    """Write `cfg.task.counts` prompts, none of which asks for what a prompt of the file `cfg.task.exclude` asks for."""
    task, out = cfg.task, file_of(cfg)
    barred = [{"prompt": prompt.text, **prompt.meta} for prompt in read_prompts(task.exclude)] if task.exclude else []
    rows = make_prompts(OmegaConf.to_container(task.counts), cfg.seed, barred)
    write_atomic(out, "".join(json.dumps(row) + "\n" for row in rows))
    listed = ", ".join(f"{count} {kind}" for kind, count in Counter(row["tag"] for row in rows).items())
    Console().print(f"{len(rows)} prompts ({listed}) in {out}", soft_wrap=True)
    return {"prompts": len(rows), "file": str(out)}
