"""Whoever looks at a log sees how far a run is: a line of steps, of how many, what is measured,
time spent and time left."""

import re

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from t2i_rl.callbacks.progress import Progress
from t2i_rl.core import progress
from t2i_rl.core.progress import Lines, ProgressCounter, duration, tracked


class Line(L.LightningModule):
    """Two optimizer steps a batch, as a rollout with two updates takes."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        for _ in range(2):
            self.layer(batch).sum().backward()
            self.optimizers().step()
        self.log("reward", float(index), prog_bar=True)

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path, max_steps: int, every_seconds: float) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        max_steps=max_steps,
        default_root_dir=tmp_path,
        callbacks=[Progress(every_seconds)],
        enable_checkpointing=False,
    )


BATCHES = DataLoader(torch.ones(20, 1), batch_size=1)


def test_training_without_a_terminal_prints_steps_reward_and_time_left(tmp_path, capsys):
    trainer(tmp_path, 8, every_seconds=0).fit(Line(), BATCHES)
    lines = re.findall(r"^training: .*$", capsys.readouterr().out, re.MULTILINE)
    assert [re.match(r"training: step (\d+) of 8, reward (\d), ", line).groups() for line in lines] == [
        ("2", "0"),
        ("4", "1"),
        ("6", "2"),
        ("8", "3"),
    ]
    assert all(line.endswith("left") for line in lines[:-1]) and "left" not in lines[-1]


def test_a_log_is_not_flooded_but_begins_and_ends(tmp_path, capsys):
    trainer(tmp_path, 40, every_seconds=1000).fit(Line(), BATCHES)
    lines = re.findall(r"^training: .*$", capsys.readouterr().out, re.MULTILINE)
    assert [line.split(",")[0] for line in lines] == ["training: step 2 of 40", "training: step 40 of 40"]


def test_evaluation_without_a_terminal_says_how_far_it_is(tmp_path, capsys):
    trainer(tmp_path, 8, every_seconds=0).test(Line(), BATCHES, verbose=False)
    assert "drawing: batch 3 of 20" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_that_counts_steps_and_no_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("t2i_rl.callbacks.progress.watched", lambda: True)
    bar = trainer(tmp_path, 8, every_seconds=0)
    bar.fit(Line(), BATCHES)
    assert "training: step" not in capsys.readouterr().out
    assert bar.callbacks[0].train_progress_bar.completed == bar.callbacks[0].train_progress_bar.total == 8


def test_a_resumed_run_counts_from_where_it_goes_on(monkeypatch):
    clock = iter([100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = Lines("training", 40, "step", done=30)
    assert lines.line(32, 10.0, "reward 1") == "training: step 32 of 40, reward 1, 10 s, about 40 s left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3661, "1 h 01 min")])
def test_a_duration_reads_as_people_say_it(seconds, text):
    assert duration(seconds) == text


def test_other_long_work_says_how_far_it_is_too(capsys):
    assert list(tracked("abc", "drawing", "batch")) == ["a", "b", "c"]
    with ProgressCounter("making", 10, "prompt", done=4) as making:
        making.advance(6, "4 left out")
    said = capsys.readouterr().out
    assert "drawing: batch 1 of 3" in said and "drawing: batch 3 of 3" in said
    assert "making: prompt 10 of 10, 4 left out" in said


def test_processes_beside_the_main_one_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(tracked("abc", "drawing", "batch")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
