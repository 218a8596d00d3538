"""The command line works as a user meets it.

It gives one-line errors, a manual page, a whole run, a sweep, a kill and a resume.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import call

ROOT = Path(__file__).parents[2]
QUICK = [
    "debug=fdr",
    "method.group_size=2",
    "benchmark.prompts_per_task=1",
    "evaluation.stages=[base_plan,trained_plan]",
    "~callbacks.progress",
]
VOLATILE = ("time/", "throughput/", "memory/")


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, env=settings, timeout=600)


def metrics(folder: Path) -> list[dict]:
    """metrics.csv without what a clock or a memory counter wrote."""
    with (folder / "metrics.csv").open() as rows:
        return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in csv.DictReader(rows)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["reward=nsq"], "nsc"),
        (["method.optimizer.lrr=1"], "method.optimizer.lr"),
        (["+trainer.gradient_clip_val=1"], "method.max_grad_norm"),
        (["+trainer.accumulate_grad_batches=4"], "method.micro_batch_size"),
        (["trainer.precision=17"], "bf16-mixed"),
        (["method.max_grad_norm=-1"], "method.max_grad_norm must be a number above 0"),
        (["method.kl_coef=nan"], "method.kl_coef must be a finite number"),
        (["task=generate"], "prompts_file"),
        (["task=pretrain", "model=janus_pro_1b"], "janus_tiny"),
        (["ckpt_path=nowhere.ckpt"], "no such file"),
        (["ckpt_path=last"], "no run below"),
        (["data=prompts"], "data.path"),
        (["method.logprob=x"], "guided_detach_uncond"),
        (["reward.aggregation=x"], "modality_mean"),
        (["model=janus_pro_1b"], "deepseek-community/Janus-Pro-1B"),
        (["evaluation.stages=[trained_turns]"], "take method=irg"),
        (["method=irg", "model=sd_tiny"], "IRG takes autoregressive models"),
        (["method=irg", "data=shapes"], "data=irgl_shapes"),
        (["method=irg", "reward=oracle"], "reward=none"),
        (["method=irg", "stage=3"], "stage must be one of 1, 2"),
        (["method=irg", "method.drop_image=1"], "method.drop_image"),
        (["method=irg", "method.interleave.choose=true"], "+reward@method.judge=soft_oracle"),
        (["method=irg", "method.interleave.policy=all"], "append, window"),
        (["method=irg", "data=irgl", "data.path=nowhere"], "no such file"),
        (["method=irg_grpo", "reward=nsc"], "pictures alone"),
        (["method=irg_grpo", "method.reward_on=first"], "last, gain"),
        (["method=irg_grpo", "method.interleave.text_temperature=0.3"], "must be 1"),
        (["task=generate", "method=irg", "prompt=x", "mode=plan"], "mode must be turns"),
        (
            ["task=generate", "method=irg", "model=janus_pro_7b", "prompt=x"],
            "hf download deepseek-community/Janus-Pro-7B",
        ),
        (["method=irg", "+reward@method.judge=oracle"], "may not choose its own pictures"),
        (["method=irg", "method.start_from=LICENSE"], "start_from=LICENSE"),
        (["method=irg", "data.batch_size=3", "trainer=ddp_sim"], "does not split over 2 ranks"),
        (["method=irg_grpo", "method.interleave.retries=1"], "retries must be 0"),
        (["task=make_irgl", "task.out=x", "task.words=[5,1]"], "words must be"),
        (["task=make_irgl", "task.out=x", "task.count=0"], "task.count"),
        (["method=irg", "data.maker.teacher.size=64"], "reads images of 64 pixels, but this model draws 32x32"),
        (
            ["task=generate", "method=irg", "prompt=x", "+reward@method.judge=soft_oracle"],
            "judges by each prompt's 'include'",
        ),
        (["task=make_irgl", "task.out=x", f"prompts_file={ROOT}/LICENSE"], "has no 'include'"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(tmp_path, arguments, named, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, *arguments) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and named in lines[0] and "Traceback" not in said, said


def test_a_refusal_is_the_same_from_the_shell(tmp_path):
    done = run("reward=nsq", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_the_manual_page_names_every_choice(tmp_path):
    page = run("--help", cwd=tmp_path).stdout
    for path in (ROOT / "conf").glob("*/**/*.yaml"):
        assert path.stem in page, path
    assert "what goes with what" in page and "method=iris" in page


def test_a_run_leaves_everything_behind_and_no_secret(tmp_path):
    done = run(*QUICK, "hydra.run.dir=out", cwd=tmp_path, WANDB_API_KEY="secret-key-0123456789")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results["stages"]) == {"base_plan", "trained_plan"} and results["steps"] == 2
    assert results["comparisons"][0]["metrics"]["overall"]["n_prompts"] == 6
    provenance = json.loads((out / "provenance.json").read_text())
    assert (
        provenance["status"] == "finished"
        and provenance["packages"]["torch"].startswith("2.")
        and "debug=fdr" in provenance["command"]
    )
    assert len(metrics(out)) == 2 and (out / "report.html").stat().st_size > 10_000
    assert list((out / "samples").glob("step_*.png")) and (out / "checkpoints" / "last.ckpt").is_file()
    for path in out.rglob("*"):
        assert not path.is_file() or b"secret-key-0123456789" not in path.read_bytes(), path


@pytest.mark.slow
def test_a_sweep_is_its_single_runs_and_ends_with_one_table(tmp_path):
    """Nothing leaks from job to job.

    The second job of a sweep gives the very numbers of a run on its own.
    """
    arguments = [*QUICK, "method.kl_coef=0"]
    alone = run(*arguments, "reward=random", "hydra.run.dir=alone", cwd=tmp_path)
    sweep = run("-m", *arguments, "reward=nsc,random", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert alone.returncode == sweep.returncode == 0, sweep.stderr
    folders = sorted(path.parent for path in (tmp_path / "sweep").rglob("results.json"))
    assert len(folders) == 2 and "reward=random" in folders[1].name
    assert metrics(folders[1]) == metrics(tmp_path / "alone")
    assert "All jobs" in sweep.stdout and (tmp_path / "sweep" / "report.html").is_file()
    with (tmp_path / "sweep" / "sweep.csv").open() as rows:
        found = {(row["reward"], row["of"], row["metric"]): float(row["value"]) for row in csv.DictReader(rows)}
    results = json.loads((folders[1] / "results.json").read_text())
    assert found["random", "trained_plan - base_plan", "overall"] == results["headline"]["difference"]


@pytest.mark.slow
def test_a_failing_job_does_not_stop_the_sweep(tmp_path):
    """And a run that evaluates nothing is a run."""
    quick = [*QUICK[:2], "evaluation.stages=[]"]
    done = run("-m", *quick, "method.logprob=wrong,conditional", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 1
    assert len(list((tmp_path / "sweep").rglob("results.json"))) == 1 and "failed:" in done.stdout
    assert (tmp_path / "sweep" / "report.html").is_file() and "nothing was evaluated" in done.stdout


@pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, how):
    """A run that is killed and resumed gives the metrics and verdicts of one that never stopped.

    It is killed at some moment after the third step, and resumed with ckpt_path=last.
    """
    settings = [*QUICK, "trainer.max_steps=7", "callbacks.checkpoint.every_n_steps=2", "method.updates_per_rollout=1"]
    whole = run(*settings, "hydra.run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(*settings), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        found = list(tmp_path.glob("outputs/train/*/metrics.csv"))
        if found and len(found[0].read_text().splitlines()) >= 4:
            process.send_signal(how)
            break
        time.sleep(0.02)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode not in (0, None), output
    folder = found[0].parent
    assert not (folder / "results.json").exists() and (folder / "checkpoints" / "last.ckpt").is_file(), output
    resumed = run(*settings, "ckpt_path=last", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(folder) == metrics(tmp_path / "whole")
    for stage in ("base_plan", "trained_plan"):
        records = [
            (tmp_path / place / "evaluation" / stage / "records.jsonl").read_text() for place in (folder, "whole")
        ]
        assert records[0] == records[1]


@pytest.mark.slow  # tests/methods/test_ddp.py has the same of one step
def test_two_cpu_processes_give_what_one_gives(tmp_path):
    done = run(*QUICK, "trainer=ddp_sim", "trainer.max_steps=2", "hydra.run.dir=two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = run(*QUICK, "trainer=cpu", "trainer.max_steps=2", "hydra.run.dir=one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert [path.name for path in tmp_path.iterdir()].count("outputs") == 0, "a second run folder was written"
    for stage in ("base_plan", "trained_plan"):
        one, two = (
            [
                json.loads(line)
                for line in (tmp_path / place / "evaluation" / stage / "records.jsonl").read_text().splitlines()
            ]
            for place in ("one", "two")
        )
        assert [row["prompt_id"] for row in one] == [row["prompt_id"] for row in two]
        assert [row["plan"] for row in one] == [row["plan"] for row in two]
    rewards = [[float(row["reward/total"]) for row in metrics(tmp_path / place)] for place in ("one", "two")]
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-4)


def test_images_are_generated_and_judged(tmp_path):
    done = run("task=generate", "prompt=three red circles", "num_images=2", "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["plan"] and (tmp_path / "out" / "grid.png").is_file()
    judged = run(
        "task=judge", "prompt=three red circles", "image=out/images/00000.png", "hydra.run.dir=out", cwd=tmp_path
    )
    assert judged.returncode == 0 and "strict" in judged.stdout and (tmp_path / "out" / "judged.png").is_file()
    unknown = run("task=judge", "prompt=three red circle", "image=out/images/00000.png", cwd=tmp_path)
    assert unknown.returncode == 2 and "three red circles" in unknown.stderr


@pytest.mark.slow
def test_a_trained_checkpoint_is_evaluated_beside_its_base(tmp_path):
    trained = run(*QUICK, "hydra.run.dir=out", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    done = run(*QUICK, "task=evaluate", "ckpt_path=out/checkpoints/last.ckpt", "hydra.run.dir=again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, again = (json.loads((tmp_path / place / "results.json").read_text())["stages"] for place in ("out", "again"))
    assert first["trained_plan"] == again["trained_plan"] and first["base_plan"] == again["base_plan"]
