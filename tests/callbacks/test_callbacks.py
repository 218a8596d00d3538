"""The callbacks that let a run survive, on a module small enough to train in milliseconds."""

import os
import random
import signal
import time
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from t2i_rl.callbacks.checkpoint import CheckpointEvery
from t2i_rl.callbacks.progress import Progress
from t2i_rl.callbacks.rng_state import RNGState, generators, set_generators
from t2i_rl.callbacks.sample_grid import SampleGrid
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.rewards.random import Random
from t2i_rl.tasks.loggers import log_results, wandb_logger
from tests.support.tiny import load_tiny_janus, save_tiny_janus


class Module(L.LightningModule):
    """Two optimizer steps a batch by manual optimisation.

    `draws` takes one number from each generator at every batch.
    """

    def __init__(self, terminate_at: int | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.draws, self.terminate_at = [], terminate_at

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward((self.weight - 1) ** 2)
            self.optimizers().step()
        self.draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        if self.global_step == self.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(100), batch_size=1)


def train(module: Module, folder, callbacks: list, max_steps: int, ckpt_path=None) -> None:
    L.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=max_steps, default_root_dir=folder, callbacks=callbacks, **quiet)
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)


def saved_at(path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_the_bar_counts_steps_and_not_epochs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("t2i_rl.callbacks.progress.watched", lambda: True)  # a terminal
    shown = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(max_steps=4, default_root_dir=tmp_path, callbacks=[Progress()], **shown).fit(Module())
    said = capsys.readouterr().out
    assert "training" in said and "/4" in said and "Epoch" not in said


def test_saves_are_not_skipped_when_a_batch_takes_several_steps(tmp_path):
    train(Module(), tmp_path, [CheckpointEvery(tmp_path, every_n_steps=3, keep_every_n_steps=5)], max_steps=14)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step_000006.ckpt", "step_000012.ckpt"]
    assert saved_at(tmp_path / "last.ckpt") == 14


def test_sigterm_saves_the_running_step_and_stops(tmp_path):
    before, module = signal.getsignal(signal.SIGTERM), Module(terminate_at=4)
    with pytest.raises(SIGTERMException):
        train(module, tmp_path, [CheckpointEvery(tmp_path, every_n_steps=100)], max_steps=20)
    assert saved_at(tmp_path / "last.ckpt") == 4 and len(module.draws) == 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_generator_goes_on_where_the_checkpoint_left_it(tmp_path):
    whole, resumed = Module(), Module()
    train(whole, tmp_path, [RNGState(), CheckpointEvery(tmp_path, keep_every_n_steps=6)], max_steps=11)
    train(
        resumed,
        tmp_path / "resumed",
        [RNGState(), CheckpointEvery(tmp_path / "resumed")],
        11,
        tmp_path / "step_000006.ckpt",
    )
    assert resumed.draws == whole.draws[3:] and resumed.weight == whole.weight


def test_a_rank_takes_its_own_generators():
    torch.manual_seed(1)
    first = generators()
    torch.manual_seed(2)
    second, expected = generators(), torch.rand(3)
    callback = RNGState()
    callback.load_state_dict({"ranks": [first, second]})
    callback.on_train_start(type("Trainer", (), {"global_rank": 1}), None)
    assert torch.equal(torch.rand(3), expected)
    set_generators(first)
    assert not torch.equal(torch.rand(3), expected)


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    logger = wandb_logger(str(tmp_path), None, project="test")
    change = {"overall": {"difference": 0.1, "low": None, "high": None}}
    results = {
        "stages": {"base_plan": {"metrics": {"overall": {"mean": 0.5, "low": 0.4, "high": 0.6}}}},
        "comparisons": [{"a": "base_plan", "b": "trained_plan", "metrics": change}],
    }
    log_results([logger], results)
    assert logger.experiment.summary["eval/base_plan/overall/low"] == 0.4
    assert logger.experiment.summary["eval/trained_plan-base_plan/overall/difference"] == 0.1
    first = logger.experiment.id
    wandb.finish()
    again = wandb_logger(str(tmp_path), "last.ckpt", project="test").experiment.id
    wandb.finish()
    other = wandb_logger(str(tmp_path), None, project="test").experiment.id
    wandb.finish()
    assert first == again != other


def test_sample_grids_show_the_model_as_it_is(tmp_path):
    """Same prompts, same seeds: equal pictures for equal weights, others once the weights have moved."""
    module = GRPO(
        load_tiny_janus(save_tiny_janus(tmp_path / "janus")), Random(), optimizer=torch.optim.SGD, kl_coef=0.0
    )
    grid = SampleGrid(str(tmp_path), every_n_steps=1, prompts=["a red circle", "three blue squares"])
    pictures = []
    for step in range(3):
        trainer = SimpleNamespace(global_step=step, is_global_zero=True, loggers=[])
        grid.on_train_batch_end(trainer, module, None, None, step)
        pictures.append((tmp_path / "samples" / f"step_{step:06d}.png").read_bytes())
        if step == 1:
            with torch.no_grad():
                module.model.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(-2)
    assert pictures[0] == pictures[1] != pictures[2]


def test_an_offline_wandb_run_that_is_resumed_goes_on_at_its_row_and_says_how_to_upload_it(
    tmp_path, monkeypatch, capfd
):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    first = wandb_logger(str(tmp_path), None, project="p")
    assert "WARNING" not in capfd.readouterr().err
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in range(3):
        first.log_metrics({"x": float(step)}, step=step)
    wandb.finish()
    assert "wandb sync" not in capfd.readouterr().out
    time.sleep(1)  # W&B names a part by the second it begins in
    second = wandb_logger(str(tmp_path), "last.ckpt", project="p")
    row = second.experiment.step
    second.log_metrics({"x": 3.0}, step=3)
    run, after = second.experiment.id, second.experiment.step
    wandb.finish()
    assert (row, after) == (3, 4) and len(list(tmp_path.glob(f"wandb/offline-run-*-{run}"))) == 2
    lines = [line for line in capfd.readouterr().out.splitlines() if "wandb sync" in line]
    assert len(lines) == 1 and lines[0].endswith(f"{tmp_path}/wandb/offline-run-*-{run}")
