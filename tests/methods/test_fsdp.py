"""FSDP2 with two processes (gloo) through the command line: the curves of one process, and checkpoints that either goes
on from."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CURVES = ("reward/total", "train/loss", "train/kl", "train/grad_norm", "image/self_certainty", "text/self_certainty")
COMMON = [
    "reward=nsc",
    "debug=fdr",
    "method.group_size=2",
    "method.image_loss_weight=1",
    "method.optimizer.lr=1e-5",
    "evaluation.stages=[trained_plan]",
    "benchmark.prompts_per_task=1",
    "benchmark.samples_per_prompt=1",
    "method.micro_batch_size=2",
    "~callbacks.progress",
]


def run(folder: Path, *arguments: str) -> Path:
    command = [sys.executable, "run.py", *COMMON, f"hydra.run.dir={folder}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def rows(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def assert_same_curves(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b) > 0
    for left, right in zip(a, b):
        for name in CURVES:
            assert float(left[name]) == pytest.approx(float(right[name]), rel=2e-3, abs=1e-5), (left["step"], name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_two_shards_train_as_one_process_and_go_on_from_each_other(tmp_path):
    keep = "callbacks.checkpoint.keep_every_n_steps=2"
    one = run(tmp_path / "one", "trainer=cpu", "trainer.max_steps=4", keep)
    two = run(tmp_path / "two", "trainer=fsdp_sim", "trainer.max_steps=4", keep)
    assert_same_curves(rows(one), rows(two))
    assert weights(one).keys() == weights(two).keys()
    for name, value in weights(one).items():
        assert (weights(two)[name] - value).abs().max() < 5e-5, name  # four steps of 1e-5
    for name, start, trainer in (("again", two, "fsdp_sim"), ("single", two, "cpu"), ("sharded", one, "fsdp_sim")):
        halfway = f"ckpt_path={start}/checkpoints/step_000002.ckpt"
        onward = run(tmp_path / name, f"trainer={trainer}", "trainer.max_steps=4", halfway)
        assert_same_curves(rows(two)[2:], rows(onward))


@pytest.mark.slow
def test_adapters_are_sharded_too(tmp_path):
    settings = ("method=iris_lora", "method.lora.r=4", "method.gradient_checkpointing=true", "trainer.max_steps=2")
    one, two = (run(tmp_path / name, f"trainer={name}", *settings) for name in ("cpu", "fsdp_sim"))
    assert_same_curves(rows(one), rows(two))
    assert all("lora_" in name for name in weights(two))
