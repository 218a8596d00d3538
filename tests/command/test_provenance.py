"""A run's records are written whatever the machine's state.

They say how the run ended, also where it was killed.
"""

import json
import subprocess

import pytest

from t2i_rl.command import provenance
from t2i_rl.command.provenance import finish, outcome, record
from t2i_rl.command.resume import continue_in_place
from t2i_rl.core.errors import UserError
from t2i_rl.core.folders import Lock
from t2i_rl.core.places import CONF
from tests.command.test_sweeps_and_runs import FAKE_TASK, finished_run
from tests.support.commands import call


def recorded(folder) -> dict:
    return record(folder, ["run.py"], [])


def test_a_diff_that_is_not_utf8_is_kept_byte_for_byte(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for content in (b"caf\xe9\n", b"th\xe9\n"):
        (tree / "latin.txt").write_bytes(content)
        if not (tree / ".git").exists():
            identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
            for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
                subprocess.run(["git", *command], cwd=tree, check=True)
    monkeypatch.setattr(provenance, "ROOT", tree)
    facts = recorded(tmp_path / "out")
    assert facts["git_dirty"] and len(facts["git_commit"]) == 40
    assert b"-caf\xe9\n+th\xe9\n" in (tmp_path / "out" / "git.diff").read_bytes()


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert recorded(tmp_path / "out")["git_commit"] is None and not (tmp_path / "out" / "git.diff").exists()


@pytest.mark.parametrize("damage", ["no METADATA", "no name", "not UTF-8"])
def test_a_broken_package_is_named_and_hides_no_other(tmp_path, monkeypatch, damage):
    broken = tmp_path / "site" / "half_installed-1.0.dist-info"
    broken.mkdir(parents=True)
    if damage != "no METADATA":
        (broken / "METADATA").write_bytes(b"Version: 1.0\n" if damage == "no name" else b"Name: \xff\xfe\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    packages = recorded(tmp_path / "out")["packages"]
    assert packages["torch"].startswith("2.") and len(packages) > 10
    json.dumps(packages)


def test_a_record_cut_short_is_kept_as_it_is_and_stops_nobody(tmp_path):
    (tmp_path / "provenance.json").write_text('{"command": "pyth')
    assert outcome(tmp_path)[0] == "unknown"
    assert recorded(tmp_path)["earlier"] == [{"status": "unknown", "text": '{"command": "pyth'}]


def test_a_run_that_says_running_and_that_nobody_works_at_was_killed(tmp_path):
    facts, lock = recorded(tmp_path), Lock(tmp_path)
    lock.take()
    assert outcome(tmp_path) == ("running", None)
    lock.release()
    status, why = outcome(tmp_path)
    assert status == "killed" and f"process {facts['pid']}" in why
    assert recorded(tmp_path)["earlier"][0]["status"] == "killed"
    finish(tmp_path, facts, "failed", "a reason")
    assert outcome(tmp_path) == ("failed", "a reason")


def test_the_record_has_the_line_that_the_run_ended_with(tmp_path, monkeypatch, capfd):
    assert call(monkeypatch, tmp_path, "seed=abc", "hydra.run.dir=refused") == 2
    assert outcome(tmp_path / "refused") == ("failed", capfd.readouterr().err.strip().removeprefix("error: "))
    with pytest.raises(RuntimeError):
        call(monkeypatch, tmp_path, FAKE_TASK, "seed=1", "hydra.run.dir=bug")
    assert outcome(tmp_path / "bug") == ("failed", "RuntimeError: a bug")


def test_a_full_disk_at_the_end_hides_no_error(tmp_path, monkeypatch, capsys):
    facts = recorded(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(provenance, "write_atomic", full)
    finish(tmp_path, facts, "failed", "the reason")
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [None, b"", b"a: [", b"- a list", b"\xff\xfe\x00", b"seed: ${nowhere}", b"method: {}\nmodel: {}\n"]
)
def test_a_folder_that_cannot_be_read_hides_no_run(tmp_path, monkeypatch, content):
    run = finished_run(tmp_path)
    strange = tmp_path / "outputs" / "train" / "strange"
    (strange / "checkpoints").mkdir(parents=True)
    (strange / "checkpoints" / "last.ckpt").touch()  # newer than the run's
    if content is not None:
        (strange / "config.yaml").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    quoted = str(run).replace("'", "\\'")
    assert f"hydra.run.dir='{quoted}'" in continue_in_place(["reward=oracle", "ckpt_path=last"], CONF)


def test_what_could_not_be_read_is_named_where_nothing_else_fits(tmp_path, monkeypatch):
    run = finished_run(tmp_path)
    (tmp_path / run / "config.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="1 could not be read, first it's a run"):
        continue_in_place(["reward=oracle", "ckpt_path=last"], CONF)
