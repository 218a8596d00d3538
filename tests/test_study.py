"""Studies: jobs that run once, resume, and are refused where something else made them; differences and tables."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.stats import compare_over_seeds, seed_interval
from t2i_rl.study import Study
from t2i_rl.study import jobs as jobs_module
from t2i_rl.study.arms import STUDENT, folder_name
from t2i_rl.study.jobs import Job, commits_of, require_done, run_job
from t2i_rl.study.queue import run_jobs
from t2i_rl.study.tables import difference_cell, markdown, mean_cell, share_cell
from tests.support.made_up_run import make_run

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from pathlib import Path
folder, *words = Path(sys.argv[1]), *sys.argv[2:]
print("begun with", *words)
if "fail" in words:
    sys.exit(3)
if "stop" in words and "ckpt_path=last" not in words:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_text("half of it")
    sys.exit(9)
(folder / "results.json").write_text(json.dumps(words))
"""


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    """The commit that jobs run at; a test may change it."""
    state = {"commit": "0123456789"}
    monkeypatch.setattr(jobs_module, "git_commit", lambda: state["commit"])
    return state


@pytest.fixture
def job(tmp_path):
    """Makes a job of a script that does at once what it is told."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def make(name: str, *words: str, **how) -> Job:
        folder = tmp_path / name
        return Job(name, folder, ("script.py", str(folder), *words), root=tmp_path, **how)

    return make


def results(job: Job) -> list[str]:
    return json.loads((job.folder / "results.json").read_text())


def test_a_job_runs_once_and_says_what_made_it(job, commit, capsys):
    one = job("one", "a word")
    run_job(one)
    run_job(one)
    assert results(one) == ["a word"] and (one.folder / "job.log").read_text().count("begun") == 1
    assert capsys.readouterr().out.splitlines() == ["one: done", "one: done before"]
    record = json.loads(one.record.read_text())
    assert record["command"] == "python script.py one 'a word'" and record["commits"] == [commit["commit"]]


def test_a_job_that_stopped_goes_on_from_its_checkpoint_and_remembers_both_commits(job, commit):
    one = job("one", "stop")
    with pytest.raises(UserError, match="one failed with exit code 9: see one/job.log"):
        run_job(one)
    commit["commit"] = "abcdefghij"
    run_job(one)
    assert results(one) == ["stop", "ckpt_path=last"] and commits_of([one]) == ["0123456", "abcdefg"]


def test_a_job_is_stale_where_its_command_is_another(job):
    run_job(job("one", "lr=1", "steps=5"))
    with pytest.raises(UserError, match="^one: one was made with lr=1 where the study has lr=2: delete it, or bring"):
        run_job(job("one", "lr=2", "steps=5"))
    with pytest.raises(UserError, match="in another order"):
        run_job(job("one", "steps=5", "lr=1"))


def test_a_job_is_stale_where_it_took_another_file_but_not_where_that_is_gone(job, tmp_path):
    weights = tmp_path / "weights.ckpt"
    weights.write_text("first")
    one = job("one", takes=(weights,))
    run_job(one)
    weights.write_text("second")
    with pytest.raises(UserError, match="made from another weights.ckpt"):
        run_job(one)
    weights.unlink()
    run_job(one)
    require_done([one])


def test_a_job_is_stale_where_its_experiment_has_other_settings(job, tmp_path):
    conf = tmp_path / "my_conf" / "experiment"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text("trainer: {max_steps: 5}\n")
    one = job("one", "--config-dir", "my_conf", "experiment=mine")
    run_job(one)
    (conf / "mine.yaml").write_text("# a comment changes nothing\ntrainer: {max_steps: 5}\n")
    run_job(one)
    (conf / "mine.yaml").write_text("trainer: {max_steps: 6}\n")
    with pytest.raises(UserError, match="other settings of its experiment"):
        run_job(one)


def test_results_that_nothing_accounts_for_are_refused(job):
    one = job("one")
    run_job(one)
    one.record.unlink()
    with pytest.raises(UserError, match="no job.json that says what made it"):
        require_done([one])


def test_a_table_needs_every_job(job):
    jobs = [job("one"), job("two")]
    run_job(jobs[0])
    with pytest.raises(UserError, match=r"no table: 1 of 2 jobs are not done, the first is two \(two\)"):
        require_done(jobs)


def test_a_job_without_its_result_has_failed(job):
    with pytest.raises(UserError, match="ended without model.bin"):
        run_job(job("one", result="model.bin"))


def test_jobs_wait_for_what_they_need_and_a_failure_stops_only_those(job, tmp_path):
    first = job("first")
    second = job("second", needs=(first,), takes=(first.folder / "results.json",))
    broken = job("broken", "fail")
    hopeless = job("hopeless", needs=(broken,))
    finished = []
    with pytest.raises(UserError, match="^broken failed with exit code 3: .*; 1 that need them were not begun$"):
        run_jobs([hopeless, broken, second, first], 2, lambda job: finished.append(job.name))
    assert finished == ["first", "second"] and not hopeless.folder.exists()


def test_a_job_is_refused_before_any_begins_where_what_it_needs_is_nowhere(job, tmp_path):
    first, free = job("first"), job("free")
    with pytest.raises(UserError, match="second needs first, which is not done: run that too"):
        run_jobs([free, job("second", needs=(first,))], 1)
    run_job(first)
    with pytest.raises(UserError, match="third takes gone.ckpt, which is not there"):
        run_jobs([free, job("third", needs=(first,), takes=(tmp_path / "gone.ckpt",))], 1)
    assert not free.folder.exists()


def test_a_stage_that_another_job_has_drawn_whole_is_taken_over(job, tmp_path):
    stages = [tmp_path / name / "evaluation" / "base_plan" for name in ("half", "whole")]
    for stage in stages:
        stage.mkdir(parents=True)
        (stage / "records.jsonl").write_text(stage.parents[1].name)
    (stages[1] / "fingerprint.json").write_text("{}")
    one = job("one", drawn=tuple(stages))
    run_job(one)
    assert (one.folder / "evaluation" / "base_plan" / "records.jsonl").read_text() == "whole"


def study_in(folder: Path, **changes) -> Study:
    arms = {"oracle": ["reward=oracle"], "random": ["reward=random"]}
    return Study(**{"folder": folder, "arms": arms, "control": "random", "root": folder, **changes})


def finish(study: Study, rates: dict[str, float]) -> None:
    """Made-up runs of every arm and seed, as finished jobs."""
    for arm in study.arms:
        for number, seed in enumerate(study.seeds):
            make_run(study.run_folder(arm, seed), seed=seed, rate=rates[arm] + 0.02 * number, per_task=4)
            study.job(arm, seed).begin()


def test_a_job_of_a_study_has_its_arms_settings_after_the_shared_ones_and_shares_the_base(tmp_path):
    study = study_in(tmp_path, shared=["trainer.max_steps=5"])
    job = study.job("random", 2, "data.seed=7", takes=(tmp_path / "x",))
    folder = tmp_path / "random" / "seed_2"
    settings = ("trainer.max_steps=5", "reward=random", "data.seed=7", "seed=2", f"hydra.run.dir={folder}")
    assert job.command == (str(ROOT / "run.py"), *settings) and job.takes == (tmp_path / "x",)
    assert job.drawn == (tmp_path / "oracle" / "seed_2" / "evaluation" / "base_plan",)
    assert [job.name for job in study.jobs(["oracle"])] == ["oracle, seed 0", "oracle, seed 1", "oracle, seed 2"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"a, b": [], "a b": []}, "control": None}, "share the folder a_b"),
        ({"control": "randon"}, "choose from oracle, random"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ()}, "each once"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        study_in(tmp_path, **changes)


def test_folders_of_arms_hold_no_letter_that_hydra_reads():
    names = {
        "dpo, merged + agsm tokens": "dpo_merged_+_agsm_tokens",
        "MPGR (fresh)": "MPGR_fresh",
        "lr=1e-5": "lr_1e-5",
    }
    assert {arm: folder_name(arm) for arm in names} == names


def test_differences_are_paired_by_image_within_a_seed_and_have_both_intervals(tmp_path):
    study = study_in(tmp_path)
    finish(study, {"oracle": 0.8, "random": 0.5})
    change = study.against_base("oracle")
    sides = [(study.records("oracle", "base_plan")[n], study.records("oracle", "trained_plan")[n]) for n in range(3)]
    assert change["overall"] == compare_over_seeds(sides)["overall"]
    shares = [[np.mean([row["strict"] for row in side]) for side in pair] for pair in sides]  # as many of each task
    by_seed = seed_interval([after - before for before, after in shares])
    assert [change[STUDENT][key] for key in ("difference", "low", "high")] == pytest.approx(
        [by_seed[key] for key in ("mean", "low", "high")]
    )
    random = study.against_base("random")["overall"]["difference"]
    due = study.against("random", "oracle")["overall"]["difference"]  # the bases of a seed are one
    assert due == pytest.approx(change["overall"]["difference"] - random)


def test_logged_metrics_are_read_where_they_were_logged(tmp_path):
    study = study_in(tmp_path)
    folder = study.run_folder("oracle", 0)
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,reward,val\n0,0.5,\n1,,0.25\n2,0.75,nan\n")
    steps, values = study.logged("oracle", 0, "reward")
    assert steps.tolist() == [0, 2] and values.tolist() == [0.5, 0.75]
    assert np.isnan(study.logged("oracle", 0, "val")[1][-1])  # it is the table's to show
    for arm, name in (("oracle", "lost"), ("random", "reward")):
        with pytest.raises(UserError, match="no values of lost|does not exist"):
            study.logged(arm, 0, name)


def test_cells_show_a_number_its_interval_and_what_excludes_zero():
    change = {"difference": 0.031, "low": 0.01, "high": 0.052}
    assert difference_cell(change) == "**+3.1 [+1.0, +5.2]**"
    assert difference_cell({**change, "low": -0.01}, scale=1, digits=2) == "+0.03 [-0.01, +0.05]"
    assert difference_cell({"difference": -0.5, "low": None, "high": None, "no_interval": "x"}) == "-50.0 [x]"
    assert share_cell([0.9, 1.0, 0.8]).endswith(", 100.0]") and share_cell([0.9, 0.8]) == "85.0 [too few seeds]"
    assert mean_cell([1.0, 2.0, 3.0], ".2f") == "2.00 [-0.48, 4.48]"


def test_tables_have_numbers_to_the_right_and_empty_cells():
    lines = markdown(["arm", "kind", "share"], [["a", "", None]], names=2)
    assert lines == ["| arm | kind | share |", "|---|---|--:|", "| a |  | |", ""]
    assert markdown(["a", "b"], [])[1] == "|---|---|"


def the_docs_study(folder: Path) -> Path:
    """The file of docs/adding.md's section."""
    section = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8").split("## A study")[1]
    name, content = re.search(r"`([\w.]+)`:\n\n```python\n(.*?)```", section, flags=re.S).groups()
    (folder / name).write_text(content)
    return folder / name


def test_the_study_that_the_docs_show_writes_its_table_and_refuses_a_stale_job_in_one_line(
    tmp_path, monkeypatch, capsys
):
    file = the_docs_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [file.name, "--only-table"])
    finish(runpy.run_path(str(file))["study"], {"oracle": 0.9, "oracle, gentle": 0.7, "random": 0.5})
    runpy.run_path(str(file), run_name="__main__")
    against_base, against_control = (tmp_path / "gentle.md").read_text().split("## ")[1:]
    rows = {line.split(" | ")[0]: line for line in against_control.splitlines() if line.startswith("| o")}
    assert "Trained minus `random`" in against_control and set(rows) == {"| oracle", "| oracle, gentle"}
    assert "**+" in rows["| oracle"] and "| random | " in against_base
    file.write_text(file.read_text().replace("lr=1e-5", "lr=2e-5"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("error: oracle, gentle, seed 0: outputs/gentle/oracle_gentle/seed_0 was made with")
