"""A checkpoint is whole or not there: while it is written, upon a full disk, after a kill, and
where the file given is something else."""

import os
import pickle
import resource
import signal
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file

from t2i_rl.callbacks.checkpoint import CheckpointEvery
from t2i_rl.command.resume import continue_in_place
from t2i_rl.core import checkpoints
from t2i_rl.core.checkpoint_io import WholeCheckpoints
from t2i_rl.core.checkpoints import newest_whole, read_checkpoint, write_checkpoint
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import replacing_folder
from t2i_rl.core.places import CONF, PACKAGE
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, TokenSpec
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion
from t2i_rl.pretrain.fit import fit
from tests.callbacks.test_callbacks import Module
from tests.command.test_sweeps_and_runs import finished_run
from tests.support.commands import call, composed


def of_step(step: int, size: int = 10) -> dict:
    return {"state_dict": {"weight": torch.full((size,), float(step))}, "global_step": step}


def step_of(path: Path) -> int:
    return read_checkpoint(path)["global_step"]


@pytest.fixture
def small_disk():
    """No file grows beyond 300 kB, as on a disk that is full."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_checkpoint_of_before_and_says_so_in_a_line(tmp_path, small_disk):
    write_checkpoint(of_step(1), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="last.ckpt cannot be written: .*; the one before is still whole"):
        write_checkpoint(of_step(2, size=1_000_000), tmp_path / "last.ckpt")
    assert step_of(tmp_path / "last.ckpt") == 1 and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_network_disk_that_says_at_the_end_that_it_is_full_costs_no_checkpoint(tmp_path, monkeypatch, links):
    for step in (1, 2):
        write_checkpoint(of_step(step), tmp_path / "last.ckpt")
    if not links:
        monkeypatch.setattr(checkpoints.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device; the one before is still whole"):
        write_checkpoint(of_step(3), tmp_path / "last.ckpt")
    assert (step_of(tmp_path / "last.ckpt"), step_of(tmp_path / "previous.ckpt")) == (2, 1)


def test_a_kill_while_writing_leaves_the_checkpoint_of_before_and_the_next_save_clears_up(tmp_path, monkeypatch):
    write_checkpoint(of_step(1), tmp_path / "last.ckpt")
    child = os.fork()
    if child == 0:
        torch.save = lambda checkpoint, file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), 9))
        write_checkpoint(of_step(2), tmp_path / "last.ckpt")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert step_of(tmp_path / "last.ckpt") == 1 and len(list(tmp_path.iterdir())) == 2
    write_checkpoint(of_step(3), tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_the_last_checkpoint_stays_as_the_previous_one_and_others_replace_their_own(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(of_step(step), tmp_path / "last.ckpt")
        write_checkpoint(of_step(step), tmp_path / "best.ckpt")
    assert (step_of(tmp_path / "last.ckpt"), step_of(tmp_path / "previous.ckpt")) == (3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_a_file_system_without_hard_links_keeps_the_previous_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    for step in (1, 2):
        write_checkpoint(of_step(step), tmp_path / "last.ckpt")
    assert (step_of(tmp_path / "last.ckpt"), step_of(tmp_path / "previous.ckpt")) == (2, 1)


def train(folder: Path, max_steps: int, ckpt_path=None, **settings) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=max_steps, default_root_dir=folder, **quiet, **settings)
    trainer.fit(Module(), ckpt_path=ckpt_path, weights_only=True)


def test_training_writes_nothing_into_the_temporary_folder(tmp_path, monkeypatch):
    """On a cluster that is another file system, from which a move is a copy."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    saves = {"callbacks": [CheckpointEvery(str(tmp_path), every_n_steps=2)], "plugins": [WholeCheckpoints()]}
    train(tmp_path, 6, **saves)
    assert (step_of(tmp_path / "last.ckpt"), step_of(tmp_path / "previous.ckpt")) == (6, 4)
    train(tmp_path, 8, ckpt_path=tmp_path / "last.ckpt", **saves)
    assert step_of(tmp_path / "last.ckpt") == 8


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "trainer").glob("*.yaml")))
def test_every_trainer_writes_checkpoints_so(name):
    cfg = composed(f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.default_root_dir=x")
    trainer = instantiate(cfg.trainer, logger=False)
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpoints)


class Auto(Module):
    """As `Module`, one optimizer step a batch."""

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward((self.weight - 1) ** 2)
        self.optimizers().step()


def test_pretraining_goes_on_from_the_previous_checkpoint_where_the_last_is_broken(tmp_path, capsys):
    def stream(first: int):
        return torch.zeros(100 - first, 1)

    train_stage = partial(fit, stream=stream, folder=tmp_path, precision="32-true")
    train_stage(Auto(), steps=2)
    train_stage(Auto(), steps=3)
    (tmp_path / "last.ckpt").write_bytes(b"PK half")
    resumed = Auto()
    train_stage(resumed, steps=4)
    assert f"going on from {tmp_path / 'previous.ckpt'}" in capsys.readouterr().out
    assert step_of(tmp_path / "last.ckpt") == 4 and resumed.weight.item() == pytest.approx(1 - 0.8**4)


@pytest.mark.parametrize("broken", [b"", b"PK half", None])
def test_last_falls_back_to_the_previous_checkpoint_with_a_line(tmp_path, monkeypatch, capsys, broken):
    monkeypatch.chdir(tmp_path)
    folder = finished_run(tmp_path) / "checkpoints"
    write_checkpoint(of_step(1), folder / "previous.ckpt")
    (folder / "last.ckpt").unlink() if broken is None else (folder / "last.ckpt").write_bytes(broken)
    evaluated = continue_in_place(["task=evaluate", "reward=oracle", "ckpt_path=last"], CONF)
    assert evaluated[-1].endswith("/checkpoints/previous.ckpt'") and "last.ckpt" in capsys.readouterr().out
    assert newest_whole(folder).name == "previous.ckpt"
    (folder / "previous.ckpt").write_bytes(b"broken too")
    with pytest.raises(UserError, match=r"previous.ckpt is no checkpoint"):
        newest_whole(folder)


def foreign_files(folder: Path) -> dict[str, Path]:
    """Whatever may be given in place of a checkpoint, by what the line says of it."""
    write_checkpoint(of_step(1), folder / "whole")
    whole = (folder / "whole").read_bytes()
    save_file({"weight": torch.zeros(2)}, folder / "weights.safetensors")
    contents = {
        "the file is empty": b"",
        "cut short or damaged": whole[: len(whole) // 2],
        "not those of torch.save": b"a red circle\n",
        "damaged": b"PK\x03\x04rest",
        "cut short": pickle.dumps({"state_dict": os.system}),
        "bytes": bytes(range(200)),
    }
    for number, content in enumerate(contents.values()):
        (folder / f"{number}.ckpt").write_bytes(content)
    files = {words: folder / f"{number}.ckpt" for number, words in enumerate(contents)}
    for words, held in (
        ("another program", {"state_dict": {"a": 5}, "global_step": 1}),
        ("weights alone", {"weight": torch.zeros(2)}),
    ):
        torch.save(held, folder / words)
        files[words] = folder / words
    return files | {
        "is a safetensors file": folder / "weights.safetensors",
        "is a folder": folder,
        "no such file": folder / "none.ckpt",
    }


def test_anything_else_given_as_a_checkpoint_is_named_in_one_line(tmp_path):
    for words, path in foreign_files(tmp_path).items():
        with pytest.raises(UserError, match=words) as refusal:
            read_checkpoint(path, "method.start_from")
        assert str(refusal.value).startswith(f"method.start_from={path}") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "arguments", [["task=evaluate"], ["task=generate", "prompt=a red circle"], ["task=train"], ["task=export"]]
)
def test_a_foreign_checkpoint_is_refused_on_the_command_line_before_any_weight_loads(
    tmp_path, monkeypatch, capfd, arguments
):
    monkeypatch.setattr("t2i_rl.models.autoregressive.janus.load_pretrained", None)
    (tmp_path / "half.ckpt").write_bytes(b"PK half")
    assert call(monkeypatch, tmp_path, *arguments, "ckpt_path=half.ckpt") == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_foreign_soft_tokens_are_refused_in_one_line_before_any_weight_loads(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("t2i_rl.models.diffusion.base.load_pipeline", None)
    spec = TokenSpec("UNet2DConditionModel", {"mid_block": 0}, 4, 16)
    files = {**foreign_files(tmp_path), "of another shape": SoftTokens(spec).save(tmp_path / "tokens.safetensors")}
    files["of another model"] = SoftTokens(replace(spec, architecture="SD3")).save(tmp_path / "sd3.safetensors")
    header = files["of another shape"].read_bytes().replace(b'\\"tokens\\": 4', b'\\"tokens\\": 9')
    files["of another shape"].write_bytes(header)
    settings = {"path": str(PACKAGE / "weights" / "sd_tiny")}
    for path in files.values():
        with pytest.raises(UserError, match=r"soft.tokens") as refusal:
            StableDiffusion.check({**settings, "soft_tokens": path})
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    drawing = [
        "task=generate",
        "model=sd_tiny",
        "prompt=a red circle",
        f"model.soft_tokens={files['of another model']}",
    ]
    assert call(monkeypatch, tmp_path, *drawing) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "are for SD3, not for UNet2DConditionModel" in said


def test_a_folder_is_replaced_whole_or_stays(tmp_path):
    target = tmp_path / "model"
    with replacing_folder(target) as folder:
        (folder / "one").write_text("1")
    with pytest.raises(OSError, match="full"), replacing_folder(target) as folder:
        (folder / "two").write_text("2")
        raise OSError("full")
    assert [path.name for path in target.iterdir()] == ["one"] and list(tmp_path.iterdir()) == [target]
    with replacing_folder(target) as folder:
        (folder / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["two"] and list(tmp_path.iterdir()) == [target]
    target.rename(tmp_path / "model.before")  # as a kill between the two renames leaves it
    with pytest.raises(OSError, match="full"), replacing_folder(target):
        raise OSError("full")
    assert [path.name for path in target.iterdir()] == ["two"] and list(tmp_path.iterdir()) == [target]
