"""Item `rollout`: experiments/bench_rollout at Janus-Pro-1B's shape, random weights made on the device."""

from functools import partial

import torch

from experiments.bench_rollout.bench import COMPILED, GRAPH, Settings, bench
from experiments.bench_rollout.table import table as bench_table
from experiments.gpu.record import Measured
from experiments.gpu.terms import Terms

# All ways side by side, then compilation, which takes minutes, beside what it starts from. One chunk of 8 stands for
# the eight that the loops in chunks would take: at this size each takes a quarter of a minute.
REAL = {
    "tricks": Settings(dtypes=("bfloat16",), repeats=2, chunks=1),
    "compiled": Settings(dtypes=("bfloat16",), repeats=3, compile=True, only=(GRAPH, COMPILED)),
}
SMALL = {"dtypes": ("float32",), "prompts": 2, "group": 4, "prefix": 12, "plan_tokens": 8, "repeats": 2, "chunks": 1}
TINY = {"tricks": Settings(**SMALL), "compiled": Settings(**SMALL, only=("+ all rows that fit",))}
SIZES = {"real": ("1b", REAL), "tiny": ("tiny", TINY)}


def run(measured: Measured, terms: Terms) -> None:
    """Each part goes on from the whole rounds that an earlier lease has left."""
    size, parts = SIZES[terms.sizes]
    for name, settings in parts.items():
        begun = measured.values.get(name)
        if begun is None or not begun.get("whole"):
            keep = partial(measured.keep, name)
            result = bench(size, settings, torch.device(terms.device), begun, keep)
            keep(result | {"whole": True})


def table(measured: Measured) -> str:
    lines = [
        "Loops in chunks are timed on one chunk. `roofline`: share of the memory's own time (weights, keys and values "
        "read once a step, at the bandwidth of a large copy); `floor`: of the greater of that and the products' time, "
        "step by step."
    ]
    facts = {"command": "python experiments/gpu/run.py", "machine": measured.device}
    facts["torch"] = measured.record["versions"]["torch"]
    for name, result in measured.values.items():
        lines.append(bench_table(result | facts | {"size": f"{result['size']}, {name}"}))
        lines += [_ceilings(row) for row in result["rows"][-1:] if "floors" in row]
    return "\n\n".join(lines)


def _ceilings(row: dict) -> str:
    """What the device itself can do, as it was measured beside a row."""
    bandwidth, rate = row["floors"]["bandwidth"] / 1e9, row["floors"]["matmul_rate"] / 1e12
    copies = f"copies at {bandwidth:.0f} GB/s (read and written)"
    return f"Measured beside it: {copies}, {row['dtype']} products at {rate:.1f} TFLOP/s."
