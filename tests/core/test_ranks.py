"""Which process is which, under every launcher, and which GPU is its own."""

import pytest
import torch

from t2i_rl.core import ranks
from t2i_rl.core.ranks import global_rank, is_main_process, launcher, local_rank, own_gpu, stand_alone, use
from tests.command.test_sweeps_and_runs import FAKE_TASK
from tests.support.commands import call

SRUN = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    for name in (*ranks.RANK_VARIABLES, "SLURM_STEP_ID", "SLURM_JOB_NAME", "ENVIRONMENT", ranks.LAUNCHED_BY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_trainer", {"accelerator": None, "devices": None})


@pytest.mark.parametrize(
    ("environment", "started_by", "number", "on_its_machine"),
    [
        ({}, "none", 0, 0),
        ({**TORCHRUN, "RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, "torchrun", 8, 0),
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, "torchrun", 0, 0),
        ({**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, "srun", 3, 1),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun", 0, 0),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "3"}, "none", 0, 0),
        ({**SRUN, "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, "none", 0, 0),
        ({**SRUN, "SLURM_PROCID": "2", "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}, "srun", 2, 0),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, "none", 0, 0),
        ({"LOCAL_RANK": "1", ranks.LAUNCHED_BY: "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, "lightning", 1, 1),
        ({"NODE_RANK": "1", "WORLD_SIZE": "4"}, "hand", 1 << 16, 0),
    ],
)
def test_every_launcher_numbers_its_processes(monkeypatch, environment, started_by, number, on_its_machine):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launcher(), global_rank(), local_rank()) == (started_by, number, on_its_machine)
    assert is_main_process() is (number == 0)


@pytest.mark.parametrize(
    ("environment", "seen", "devices", "gpu"),
    [
        ({}, 4, 1, "cuda:0"),
        ({}, 4, [1], "cuda:1"),
        ({}, 4, "2,", "cuda:2"),
        ({}, 4, "2", "cuda:0"),
        ({"LOCAL_RANK": "1"}, 4, [1, 3], "cuda:3"),
        ({"LOCAL_RANK": "1"}, 4, -1, "cuda:1"),
        ({**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, 4, 4, "cuda:3"),
        ({**SRUN, "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, 1, 4, "cuda:0"),
    ],
)
def test_a_process_loads_onto_the_gpu_that_its_trainer_takes(monkeypatch, environment, seen, devices, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    use("gpu", devices)
    assert own_gpu() == gpu
    use("cpu", devices)
    assert own_gpu() == "cpu"


def test_a_process_that_stands_alone_has_no_number(monkeypatch):
    for name, value in {**TORCHRUN, **SRUN, "RANK": "3", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    stand_alone()
    assert launcher() == "none" and is_main_process() and not ranks.inherits_a_number()


def test_a_task_of_one_process_is_refused_where_srun_starts_four(tmp_path, monkeypatch, capfd):
    for name, value in {**SRUN, "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}.items():
        monkeypatch.setenv(name, value)
    assert call(monkeypatch, tmp_path, "task=generate", "prompt=x") == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "runs in one process, and this is one of several that srun started" in said[0]
    assert not (tmp_path / "outputs").exists()


def test_a_job_of_an_array_writes_its_records_whatever_its_number(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert call(monkeypatch, tmp_path, FAKE_TASK, "hydra.run.dir=out") == 0
    assert (tmp_path / "out" / "provenance.json").is_file() and (tmp_path / "out" / "config.yaml").is_file()
