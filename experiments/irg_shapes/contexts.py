"""What the second picture and the reflection are made from: their cross-entropy where a part of what they follow is taken away or exchanged.

    python experiments/irg_shapes/contexts.py <trained run> <data of another seed> <folder>     # run.py does this for every seed

Rows of `improving_full_learning` that the run has not been trained on. `another picture`: the first picture of the next row stands in the place of their own.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from t2i_rl.core.files import write_atomic
from t2i_rl.methods.irg.rounds import says_stop
from t2i_rl.methods.irg.toy_format import read_shard
from t2i_rl.models.autoregressive.segments import Segment
from t2i_rl.tasks.train import build_method

MODE, ROWS, BATCH = "improving_full_learning", 256, 16
Rows = list[tuple[Segment, ...]]


def contexts(rows: Rows) -> dict[str, Rows]:
    """The rows with what they follow changed."""
    pictures = [next(each for each in row if each.role == "draw").image for row in rows]
    exchanged = zip(rows, pictures[1:] + pictures[:1], strict=True)
    return {
        "all of it": rows,
        "another picture": [tuple(replace(each, image=image) if each.role == "draw" else each for each in row) for row, image in exchanged],
        "no picture": [without(row, "draw") for row in rows],
        "no reflection": [without(row, "reflect") for row in rows],
        "neither": [without(without(row, "draw"), "reflect") for row in rows],
    }  # fmt: skip


def without(row: Sequence[Segment], role: str) -> tuple[Segment, ...]:
    return tuple(each for each in row if each.role != role)


@torch.no_grad()
def nats(interleaved, rows: Rows, kind: str) -> float:
    """Mean cross-entropy of a token of this kind."""
    found = [interleaved([[row] for row in rows[first : first + BATCH]])[0][kind][0] for first in range(0, len(rows), BATCH)]  # fmt: skip
    return -float(torch.cat(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of method=irg")
    parser.add_argument("data", type=Path, help="folder of trajectories that it has not been trained on")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    cfg = OmegaConf.load(options.run / "config.yaml")
    model = instantiate(cfg.model)
    method = build_method(cfg, model)
    method.load(str(options.run / "checkpoints" / "last.ckpt"))
    shards = sorted((options.data / MODE).glob("*.parquet"))
    rows = [each.segments for each in islice((row for shard in shards for row in read_shard(shard, MODE)), ROWS)]
    right = [says_stop(next(each for each in row if each.role == "reflect").text, cfg.model.chat.stop) for row in rows]
    found = {}
    for name, changed in contexts(rows).items():
        halves = {part: [row for row, stop in zip(changed, right, strict=True) if stop == (part == "right")] for part in ("right", "wrong")}  # fmt: skip
        found[name] = {f"image, first picture {part}": nats(method.interleaved, half, "image") for part, half in halves.items()}  # fmt: skip
        if "reflect" in {each.role for each in changed[0]}:
            found[name]["reflection"] = nats(method.interleaved, changed, "text")
    facts = {"rows": len(rows), "right": sum(right), "nats": found}
    write_atomic(options.out / "results.json", json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
