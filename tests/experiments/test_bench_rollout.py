"""The benchmark of rollouts: what is cut short keeps its calls, and goes on."""

import json

import pytest
import torch

from experiments.bench_rollout import bench
from experiments.bench_rollout.table import table


def test_a_bench_that_is_cut_keeps_its_calls_and_goes_on_after_its_last_whole_round(monkeypatch):
    calls = []

    def ways(*_) -> dict[str, bench.Way]:
        return {name: bench.Way(lambda name=name: calls.append(name), 4) for name in (bench.PLAIN, "engine")}

    monkeypatch.setattr(bench, "build", lambda *_: None)
    monkeypatch.setattr(bench, "image_ways", ways)
    monkeypatch.setattr(bench, "plan_ways", ways)
    settings, kept = bench.Settings(dtypes=("float32",), prompts=1, group=4, repeats=3), []

    def keep(result: dict) -> None:
        kept.append(json.dumps(result))
        if len(kept) == 4 + 4 + 2:  # four to warm up, the first round, half of the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.bench("tiny", settings, torch.device("cpu"), keep=keep)
    cut = json.loads(kept[-1])
    assert [len(row["seconds"]) for row in cut["rows"] + cut["plans"]] == [2, 2, 1, 1]
    text = table(cut | {"command": "c", "machine": "m", "torch": "t"})
    assert "Medians of 1 interleaved rounds" in text and text.count("| engine | float32 |") == 2
    calls.clear()
    whole = bench.bench("tiny", settings, torch.device("cpu"), result=cut)
    assert [len(row["seconds"]) for row in whole["rows"] + whole["plans"]] == [3, 3, 3, 3]
    assert len(calls) == 4 + 2 * 4  # to warm up again, and two rounds
