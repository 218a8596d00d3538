"""What the second picture and the reflection are made from.

Their cross-entropy where a part of what they follow is taken away or exchanged:

    python experiments/irg_shapes/contexts.py <trained run> <data of another seed> <folder>     # run.py does this

Rows of `improving_full_learning` that the run has not been trained on. `another picture`: the first picture of the next
row stands in the place of their own.
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
    pictures = [first_of(row, "draw").image for row in rows]
    exchanged = zip(rows, pictures[1:] + pictures[:1], strict=True)
    return {
        "all of it": rows,
        "another picture": [with_picture(row, image) for row, image in exchanged],
        "no picture": [without(row, "draw") for row in rows],
        "no reflection": [without(row, "reflect") for row in rows],
        "neither": [without(without(row, "draw"), "reflect") for row in rows],
    }


def first_of(row: Sequence[Segment], role: str) -> Segment:
    return next(segment for segment in row if segment.role == role)


def with_picture(row: Sequence[Segment], image) -> tuple[Segment, ...]:
    return tuple(replace(segment, image=image) if segment.role == "draw" else segment for segment in row)


def without(row: Sequence[Segment], role: str) -> tuple[Segment, ...]:
    return tuple(segment for segment in row if segment.role != role)


@torch.no_grad()
def nats(interleaved, rows: Rows, kind: str) -> float:
    """Mean cross-entropy of a token of this kind."""
    batches = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
    logprobs = [interleaved([[row] for row in batch])[0][kind][0] for batch in batches]
    return -float(torch.cat(logprobs).mean())


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
    trajectories = (trajectory for shard in shards for trajectory in read_shard(shard, MODE))
    rows = [trajectory.segments for trajectory in islice(trajectories, ROWS)]
    right = [says_stop(first_of(row, "reflect").text, cfg.model.chat.stop) for row in rows]
    costs: dict[str, dict[str, float]] = {}
    for name, changed in contexts(rows).items():
        costs[name] = {}
        for part in ("right", "wrong"):
            half = [row for row, stop in zip(changed, right, strict=True) if stop == (part == "right")]
            costs[name][f"image, first picture {part}"] = nats(method.interleaved, half, "image")
        if "reflect" in {segment.role for segment in changed[0]}:
            costs[name]["reflection"] = nats(method.interleaved, changed, "text")
    facts = {"rows": len(rows), "right": sum(right), "nats": costs}
    write_atomic(options.out / "results.json", json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
