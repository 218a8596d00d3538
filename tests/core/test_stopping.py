"""Ctrl-C and SIGTERM: exit codes, what is said and kept; a second one ends at once; sweeps say what
was not run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from t2i_rl.core import stopping
from t2i_rl.core.places import CONF
from tests.support.commands import call

STOPPED = "task._target_=tests.core.test_stopping.stopped_task"
SAVING = """
import os, signal, time
from t2i_rl.core import stopping
with stopping.listening():
    stopping.save_first(True)
    print("ready", flush=True)
    while True: time.sleep(0.01)
"""


def stopped_task(cfg) -> dict:
    """Stands in for work that the user ends when the seed is 1."""
    if cfg.seed == 1:
        os.kill(os.getpid(), signal.Signals[os.environ["STOP_WITH"]])
        time.sleep(5)
    return {}


@pytest.mark.parametrize(("name", "code", "said"), [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM")])
def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path, monkeypatch, capfd, name, code, said):
    monkeypatch.setenv("STOP_WITH", name)
    handlers = [signal.getsignal(number) for number in stopping.NAMES]
    assert call(monkeypatch, tmp_path, STOPPED, "seed=1", "hydra.run.dir=out") == code
    captured = capfd.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith(f"{said}: ")]
    assert len(lines) == 1 and "begins anew" in lines[0] and not captured.err
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (record["status"], record["error"]) == ("stopped", said)
    assert handlers == [signal.getsignal(number) for number in stopping.NAMES]


def test_ctrl_c_ends_a_sweep_and_says_what_was_not_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STOP_WITH", "SIGINT")
    assert call(monkeypatch, tmp_path, "-m", STOPPED, "seed=0,1,2", "trainer=cpu", "hydra.sweep.dir=out") == 130
    out = capfd.readouterr().out
    assert "not run: seed=2" in out and "failed: seed=1" in out and "seed=0" not in out.split("Jobs that did not")[1]
    assert not (tmp_path / "out" / "seed=2").exists()


def test_between_two_steps_a_first_signal_waits_and_a_second_ends_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert "saving at the end of this step" in process.stderr.readline() and process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


@pytest.mark.parametrize(
    ("task", "kept", "said"),
    [
        ("train", ["checkpoints/last.ckpt"], "ckpt_path=last"),
        ("train", [], "keeps the stages"),
        ("evaluate", [], "keeps the stages"),
        ("pretrain", [], "goes on"),
        ("encode", [], "goes on in data"),
        ("make_irgl", [], "goes on in data"),
        ("generate", [], "begins anew"),
    ],
)
def test_every_task_says_what_a_stop_keeps(tmp_path, task, kept, said):
    for name in kept:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    cfg = OmegaConf.create(
        {"task": {"_target_": OmegaConf.load(CONF / "task" / f"{task}.yaml")._target_, "out": "data"}}
    )
    assert said in stopping.how_to_go_on(cfg, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["evaluating", "training"])
def test_ctrl_c_ends_a_real_run_with_130(tmp_path, moment):
    command = [sys.executable, str(Path(__file__).parents[2] / "run.py"), "debug=fdr", "method.group_size=2"]
    settings = [*command, "trainer.max_steps=50", "benchmark.prompts_per_task=20", f"hydra.run.dir={tmp_path}"]
    process = subprocess.Popen(settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if moment == "training":
        while process.poll() is None and not (tmp_path / "metrics.csv").exists():
            time.sleep(0.1)
    else:
        while not process.stdout.readline().startswith("base_"):
            pass
        time.sleep(2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Ctrl-C: " in said and "Traceback" not in said, said
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file() is (moment == "training")
