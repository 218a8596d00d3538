"""Trouble of the machine is one line that names the fix.

The troubles are no memory, a full disk, a closed folder and a taken port.
"""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from t2i_rl.command.rank_watch import RankWatch
from t2i_rl.command.troubles import as_one_line
from t2i_rl.core.places import CONF
from tests.support.commands import call

ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
    "numpy": MemoryError("Unable to allocate 2.00 TiB for an array"),
    "full": OSError(28, "No space left on device", "out/metrics.csv"),
    "torch full": RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter: file write failed"),
    "numpy full": OSError("4096 requested and 1024 written"),
    "closed": PermissionError(13, "Permission denied", "out/checkpoints"),
    "read-only": OSError(30, "Read-only file system", "out"),
    "port": RuntimeError("The server socket has failed to listen. port: 1, code: -98, name: EADDRINUSE"),
}


def raising(kind: str):
    def task(cfg):
        raise ERRORS[kind]

    return task


task = raising("gpu")


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("gpu", [], ("on the GPU", "method.micro_batch_size (now 32)", "model.rollout.max_rows")),
        ("cublas", ["method.gradient_checkpointing=true"], ("on the GPU", "method.micro_batch_size")),
        ("cpu", ["method=agsm", "model=sd_tiny"], ("on the CPU", "method.pairs_per_pass")),
        ("numpy", ["method=noise_opt"], ("on the CPU", "method.batch_size (now 8)", "gradient_checkpointing=true")),
        ("gpu", ["task=generate"], ("evaluation.batch_size (now 64)",)),
        ("full", [], ("disk of out is full", "paths.root_dir")),
        ("torch full", [], ("is full", "ckpt_path=last")),
        ("numpy full", [], ("is full", "paths.root_dir")),
        ("closed", [], ("out/checkpoints cannot be written (Permission denied)", "hydra.run.dir")),
        ("read-only", [], ("cannot be written (Read-only file system)",)),
        ("port", [], ("MASTER_PORT", "taken")),
    ],
)
def test_trouble_names_its_fix(tmp_path, monkeypatch, kind, settings, named):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", settings)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    line = as_one_line(ERRORS[kind], cfg, tmp_path / "out", RankWatch(tmp_path / "out"))
    assert all(part in line for part in named) and "\n" not in line, line
    assert "gradient_checkpointing" not in line or "method.gradient_checkpointing=true" not in settings


def test_other_errors_keep_their_traceback(tmp_path):
    for error in (ValueError("a bug"), FileNotFoundError(2, "No such file", "x"), PermissionError(13, "no", "/root/x")):
        assert as_one_line(error, None, tmp_path, RankWatch(tmp_path)) is None


def test_out_of_memory_is_one_line_of_the_command(tmp_path, monkeypatch, capfd):
    assert call(monkeypatch, tmp_path, "task._target_=tests.command.test_troubles.task", "hydra.run.dir=out") == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: out of memory on the GPU: take less at a time with")


@pytest.mark.parametrize("sweep", [False, True])
def test_an_outputs_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capfd, sweep):
    (tmp_path / "outputs").write_text("a file where a folder belongs")
    assert call(monkeypatch, tmp_path, *(["-m", "seed=0,1"] if sweep else [])) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "outputs" in said[0] and "paths.root_dir" in said[0], said


def test_numpy_says_what_the_list_above_says():
    with pytest.raises(MemoryError):
        np.empty(1 << 50)
