"""A sweep's jobs are known by their own records.

Whichever process they ran in, failures are counted, named and shown.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from t2i_rl.command import job, sweep
from t2i_rl.command.sweep import Launch, conclude, read_launch, unfinished_jobs
from tests.command.test_sweeps_and_runs import FAKE_TASK
from tests.support.commands import call
from tests.support.made_up_run import make_run

TABLES = "t2i_rl.command.sweep_tables.write"


def a_sweep(folder: Path, jobs: list[list[str]]) -> Launch:
    launch = Launch("this one", ["run.py", "-m"], False, jobs)
    folder.mkdir(exist_ok=True)
    (folder / sweep.LAUNCH).write_text(json.dumps(launch._asdict()))
    return launch


def a_job(folder: Path, overrides: list[str], status: str, error: str | None = None, sweep: str = "this one") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"sweep": sweep, "overrides": overrides, "status": status, "error": error, "pid": 1, "host": "elsewhere"}
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


def test_failed_killed_and_unstarted_jobs_are_told_apart(tmp_path):
    a_sweep(tmp_path, [[f"seed={seed}", "reward=nsc"] for seed in range(4)])
    a_job(tmp_path / "seed=0", ["reward=nsc", "seed=0"], "finished")
    a_job(tmp_path / "seed=1", ["reward=nsc", "seed=1"], "failed", "no such thing")
    a_job(tmp_path / "seed=2", ["reward=nsc", "seed=2"], "running")
    a_job(tmp_path / "seed=9", ["reward=nsc", "seed=9"], "failed", "of an earlier sweep", sweep="another")
    jobs = unfinished_jobs(tmp_path)
    assert [job[:2] for job in jobs] == [("seed=1", "failed"), ("seed=2", "killed"), ("seed=3", "not run")]
    assert jobs[0].error == "no such thing" and "process 1 on elsewhere" in jobs[1].error


def test_failed_jobs_stand_in_the_page_and_in_the_table(tmp_path, capsys):
    a_sweep(tmp_path, [])
    a_job(make_run(tmp_path / "seed=0"), ["seed=0"], "finished")
    a_job(tmp_path / "seed=1", ["seed=1"], "failed", "a <reason>")
    assert [job.name for job in conclude(tmp_path, TABLES)] == ["seed=1"]
    assert "failed: seed=1" in capsys.readouterr().out
    assert "a <reason>" in (tmp_path / "sweep.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;reason&gt;" in page and "<h1>1 jobs</h1>" in page
    with (tmp_path / "sweep.csv").open() as rows:
        assert {row["job"] for row in csv.DictReader(rows)} == {"seed=0"}


def test_a_sweep_of_failures_alone_has_a_page_too(tmp_path):
    a_sweep(tmp_path, [])
    a_job(tmp_path / "seed=1", ["seed=1"], "failed", "the reason")
    conclude(tmp_path, TABLES)
    assert "the reason" in (tmp_path / "report.html").read_text() and not (tmp_path / "sweep.csv").exists()


def test_a_worker_that_never_ran_main_records_the_command_of_the_sweep(tmp_path, monkeypatch):
    """Runs the job as a launcher does.

    Another process imports the task function, and nothing of this one's state is there.
    """
    monkeypatch.setattr(job.session, "command", [])
    launch = Launch("x", ["run.py", "-m", "--config-dir", "mine", "seed=0,1"], True, [])
    (tmp_path / sweep.LAUNCH).write_text(json.dumps(launch._asdict()))
    hydra_config = SimpleNamespace(mode=RunMode.MULTIRUN, sweep=SimpleNamespace(dir=str(tmp_path)))
    assert job._launch(hydra_config) == launch


def test_what_is_swept_is_known_before_it_runs(tmp_path, monkeypatch, capfd):
    assert call(monkeypatch, tmp_path, "-m", FAKE_TASK, "seed=0,2", "hydra.sweep.dir=out") == 0
    launch = read_launch(tmp_path / "out")
    assert [sorted(job)[0] for job in launch.jobs] == ["seed=0", "seed=2"] and launch.command[1] == "-m"
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("provenance.json")]
    assert {record["sweep"] for record in records} == {launch.id} and "seed=0,2" in records[0]["command"]
    assert not list(tmp_path.rglob(".lock"))


def test_options_of_a_sweep_may_stand_among_its_settings(tmp_path, monkeypatch, capfd):
    assert call(monkeypatch, tmp_path, FAKE_TASK, "--multirun", "seed=0,2", "hydra.sweep.dir=out") == 0
    assert {path.parent.name for path in tmp_path.rglob("provenance.json")} == {"seed=0", "seed=2"}


@pytest.mark.slow
def test_a_parallel_launcher_exits_with_1_where_a_job_fails(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    run = [
        sys.executable,
        str(Path(__file__).parents[2] / "run.py"),
        "-m",
        "hydra/launcher=joblib",
        "method.group_size=0,1",
    ]
    done = subprocess.run([*run, "hydra.sweep.dir=out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("failed:") == 2, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("provenance.json")]
    assert len(records) == 2 and all("method.group_size=0,1" in record["command"] for record in records)
