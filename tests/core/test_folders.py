"""Folders of runs: a name of its own for each, one for all its ranks, and a lock that a kill does
not leave shut."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from omegaconf import OmegaConf

from t2i_rl.core import folders
from t2i_rl.core.errors import UserError
from t2i_rl.core.folders import Lock, claim, claimed_outputs, give_back, in_turn, run_id
from tests.command.test_sweeps_and_runs import FAKE_TASK
from tests.support.commands import call

HOLD = """
import sys, time
from t2i_rl.core.folders import Lock
assert Lock(sys.argv[1]).take() is None
print('held', flush=True)
time.sleep(60)
"""


def holding(folder) -> subprocess.Popen:
    """Another process that has the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_runs_of_one_second_have_names_of_their_own_that_begin_with_the_time():
    names = {run_id() for _ in range(200)}
    assert len(names) == 200 and all(time.strptime(name[:19], "%Y-%m-%d_%H-%M-%S") for name in names)


def test_a_config_names_its_folder_once_and_the_next_config_another():
    configs = [OmegaConf.create({"run": "${run_id:}"}) for _ in range(2)]
    assert configs[0].run == configs[0].run != configs[1].run


def test_tasks_of_one_srun_share_a_name_and_steps_do_not(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    names = []
    for task, step in ((0, 0), (3, 0), (0, 1)):
        for name, value in (("SLURM_PROCID", task), ("SLURM_STEP_ID", step), ("SLURM_NTASKS", 4)):
            monkeypatch.setenv(name, str(value))
        names.append(run_id())
    assert names == ["slurm-77.0", "slurm-77.0", "slurm-77.1"]


def test_ranks_started_by_hand_are_asked_for_a_folder(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(UserError, match="hydra.run.dir"):
        run_id()


def test_a_folder_in_use_is_refused_in_one_line_and_left_as_it_is(tmp_path, monkeypatch, capfd):
    process = holding(tmp_path / "out")
    try:
        assert call(monkeypatch, tmp_path, FAKE_TASK, "hydra.run.dir=out") == 2
    finally:
        process.kill()
        process.wait()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and f"in use by process {process.pid}" in said[0] and "hydra.run.dir" in said[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert call(monkeypatch, tmp_path, FAKE_TASK, "hydra.run.dir=out") == 0, "a killed process left it shut"
    assert (tmp_path / "out" / "provenance.json").is_file() and not (tmp_path / "out" / ".lock").exists()


def test_a_sweep_in_use_is_refused_as_well(tmp_path, monkeypatch, capfd):
    process = holding(tmp_path / "out")
    try:
        assert call(monkeypatch, tmp_path, "-m", FAKE_TASK, "seed=0,2", "hydra.sweep.dir=out") == 2
    finally:
        process.kill()
        process.wait()
    assert "hydra.sweep.dir" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def left_by(host: str, folder) -> Lock:
    """The lock as a process of another machine leaves it when it is killed; this machine's kernel
    sees none."""
    folder.mkdir()
    lock = Lock(folder)
    lock.path.write_text(json.dumps({"host": host, "pid": 4711}))
    return lock


def test_a_holder_on_another_machine_is_dead_after_a_minute_without_a_sign_of_life(tmp_path):
    lock = left_by("elsewhere", tmp_path / "a")
    assert lock.take() == "process 4711 on elsewhere"
    old = time.time() - folders.SECONDS_WITHOUT_BEAT - 1
    os.utime(lock.path, (old, old))
    assert lock.take() is None
    lock.release()


def test_one_that_lives_is_told_from_one_that_does_not_by_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SECONDS_WITHOUT_BEAT", 2)
    left_by("elsewhere", tmp_path / "dead")
    claim(tmp_path / "dead", "x")
    give_back(tmp_path / "dead")
    lock = left_by("elsewhere", tmp_path / "alive")
    threading.Timer(0.5, os.utime, (lock.path,)).start()
    with pytest.raises(UserError, match="4711 on elsewhere"):
        claim(tmp_path / "alive", "x")


def test_a_killed_process_of_this_machine_is_known_at_once(tmp_path):
    lock = left_by(socket.gethostname(), tmp_path / "a")
    assert lock.holder() is None and "4711" in lock.left_behind()
    assert lock.take() is None and lock.holder() is not None and lock.left_behind() is None
    lock.release()
    assert lock.holder() is None and lock.left_behind() is None


def test_without_the_kernels_locks_a_file_system_has_signs_of_life(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    assert left_by("elsewhere", tmp_path / "a").take() == "process 4711 on elsewhere"
    held = Lock(tmp_path / "b")
    assert held.take() is None and Lock(tmp_path / "b").take() == f"process {os.getpid()} on {socket.gethostname()}"
    held.release()
    again = Lock(tmp_path / "b")
    assert again.take() is None
    again.release()
    left = left_by(socket.gethostname(), tmp_path / "c")
    left.path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    old = time.time() - folders.SECONDS_WITHOUT_BEAT - 1
    os.utime(left.path, (old, old))
    assert left.holder() is None  # in a container every run has the same number


def test_a_lock_in_a_folder_that_may_only_be_read_still_says_who_has_it(tmp_path, monkeypatch):
    lock = left_by("elsewhere", tmp_path / "a")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders.tempfile, "NamedTemporaryFile", refuse)
    assert lock.holder() == "process 4711 on elsewhere"


def test_what_task_out_names_is_locked_beside_it_and_parts_share_it(tmp_path):
    def cfg(**task):
        return OmegaConf.create({"task": {"out": str(tmp_path / "data"), **task}})

    with claimed_outputs(cfg()):
        assert not (tmp_path / "data").exists() and Lock(tmp_path, ".data.lock").holder()
    with claimed_outputs(cfg(part=0, parts=2)):
        assert Lock(tmp_path, ".data.part0.lock").holder() and not Lock(tmp_path, ".data.part1.lock").holder()
    other = Lock(tmp_path, ".data.lock")
    assert other.take() is None
    with pytest.raises(UserError, match="task.out"), claimed_outputs(cfg()):
        pass
    other.release()


def test_data_that_two_runs_want_are_made_by_one_while_the_other_waits(tmp_path, capsys):
    order = []

    def make(name: str) -> None:
        with in_turn(tmp_path / "data"):
            order.append(f"{name} begins")
            time.sleep(0.2)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=make, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line[0] for line in order] in (list("aabb"), list("bbaa")) and "waiting for" in capsys.readouterr().out
