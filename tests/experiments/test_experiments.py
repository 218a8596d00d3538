"""The experiments' runners: tables and figures from made-up jobs, what they refuse, and their arms compose."""

import csv
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.records import write_records
from t2i_rl.study import jobs as jobs_module
from t2i_rl.study.jobs import Job
from tests.conf.test_configs import composed
from tests.support.made_up_run import make_records

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    monkeypatch.setattr(jobs_module, "git_commit", lambda: "0123456789")


def loaded(name: str, tmp_path, monkeypatch, script: str = "run"):
    """The runner of an experiment, with its jobs and its table under `tmp_path`."""
    spec = importlib.util.spec_from_file_location(f"{name}_{script}", ROOT / "experiments" / name / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    if hasattr(module, "study"):
        monkeypatch.setattr(module, "study", replace(module.study, folder=tmp_path / "outputs"))
    return module


def finish(job: Job, stages: dict[str, list[dict]], width: int = 4, pictures: bool = False) -> None:
    """A finished job of made-up records."""
    rng = np.random.default_rng(len(job.name))
    for stage, records in stages.items():
        folder = job.folder / "evaluation" / stage
        (folder / "images").mkdir(parents=True)
        write_records(folder / "records.jsonl", records)
        np.save(folder / "features.npy", rng.random((len(records), width)))
        for record in records if pictures else ():
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / record["image"])
    metrics = {"overall": {"mean": 0.5, "low": 0.4, "high": 0.6, "n_prompts": 24}}
    results = {
        **dict.fromkeys(("task", "method", "model", "reward", "headline"), "made up"),
        **{"seed": 0, "steps": 40, "benchmark": {"name": "shapes", "n_prompts": 24, "samples_per_prompt": 2}},
        **{"stages": {stage: {"metrics": metrics} for stage in stages}, "comparisons": []},
    }
    (job.folder / "results.json").write_text(json.dumps(results))
    (job.folder / "provenance.json").write_text(json.dumps({"device": "a made-up machine"}))
    take_and_begin(job)


def take_and_begin(job: Job) -> None:
    for file in job.takes:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    job.begin()


def pretend(jobs: list[Job]) -> None:
    """Jobs that are done by all that is looked at before their results are read."""
    for job in jobs:
        (job.folder / job.result).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / job.result).touch()
        take_and_begin(job)


def rows_of(text: str) -> dict[str, list[str]]:
    """The tables' rows by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines}


def damage(job: Job, how: str) -> None:
    """Take a job's results away, or have it made by something else."""
    if how == "missing":
        (job.folder / job.result).unlink()
    else:
        record = json.loads(job.record.read_text())
        job.record.write_text(json.dumps({**record, "command": record["command"] + " seed=9"}))


MISSING_OR_STALE = pytest.mark.parametrize(
    ("how", "said"), [("missing", "no table: 1 of .* not done, the first is"), ("stale", "was made with seed=9 where")]
)


@pytest.fixture
def iris(tmp_path, monkeypatch):
    return loaded("iris_shapes", tmp_path, monkeypatch)


def test_the_sign_experiments_table_and_figure_say_what_the_runs_say(iris, tmp_path, monkeypatch):
    """In the jobs' logs the plans' KL grows by 0.004 a step. Some of the arms, for the time that all would take."""
    arms = {arm: iris.ARMS[arm] for arm in ("oracle", "nsc", "random", "nsc gentle", "random gentle", "nsc released")}
    monkeypatch.setattr(iris, "ARMS", arms)
    monkeypatch.setattr(iris, "study", replace(iris.study, arms=arms))
    for arm, seed in product(iris.ARMS, iris.study.seeds):
        rate = 1.0 if arm == "oracle" else 0.5
        job = iris.study.job(arm, seed)
        finish(job, {"base_plan": make_records(0.5, seed, 4), "trained_plan": make_records(rate, seed + 100, 4)})
        rng = np.random.default_rng(seed)
        with (job.folder / "metrics.csv").open("w") as file:
            writer = csv.DictWriter(file, ["step", "watch/oracle", *iris.LOGGED])
            writer.writeheader()
            for step in range(20):
                values = {name: rng.random() for name in iris.LOGGED} | {"text/kl": 0.004 * step}
                accuracy = 0.5 if arm == "random gentle" else 0.5 + 0.01 * step
                writer.writerow({"step": step, "watch/oracle": accuracy, **values})
    iris.write_table()
    iris.write_figure()
    against_base, against_control, inside, at_kl = (tmp_path / "table.md").read_text().split("## ")[1:]
    against_base, against_control = rows_of(against_base), rows_of(against_control)
    assert "**" in against_base["oracle"][1] and "**" not in against_base["random"][1]
    assert set(iris.ARMS) < set(against_base)
    assert iris.CONTROL not in against_control and "nsc gentle" in against_control
    # the mean of steps i to i+4 is 0.004 (i + 2): 0.01 is reached at i=1, 0.03 at i=6, 0.1 never
    assert "| oracle | +3.0 [seeds agree] | +8.0 [seeds agree] | not reached |" in at_kl
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@MISSING_OR_STALE
def test_the_sign_experiment_refuses_a_job_that_is_not_done_or_stale(iris, how, said):
    pretend(iris.study.jobs())
    damage(iris.study.job("nsc gentle", 1), how)
    with pytest.raises(UserError, match=said):
        iris.write_table()


def test_every_arm_of_the_sign_experiment_composes(iris):
    for overrides in iris.ARMS.values():
        composed("experiment=iris_shapes", *overrides)


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    module = loaded("alignment_shapes", tmp_path, monkeypatch)
    monkeypatch.setattr(module, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(module, "BENCH", tmp_path)
    return module


def test_every_rung_of_the_alignment_ladder_composes_and_lora_is_as_large_as_the_tokens(ladder):
    for model in ladder.MODELS:
        sizes = {}
        for job in ladder.jobs_of(model, 1):
            cfg = composed(*(word for word in job.command[1:] if not word.startswith("hydra.")))
            arm = job.name.removeprefix(f"{model}, ").removesuffix(", seed 1")
            if arm in ladder.TRAINED:
                assert cfg.trainer.max_steps == 300 and list(cfg.evaluation.stages) == ["base_direct", "trained_direct"]
            if arm in ("denoising", "lora"):
                method = instantiate(cfg.method, model=instantiate(cfg.model))
                sizes[arm] = sum(part.numel() for part in method.parameters() if part.requires_grad)
        assert 0.85 < sizes["lora"] / sizes["denoising"] < 1.15, sizes


@pytest.mark.slow
def test_the_alignment_table_says_what_the_runs_say(ladder, tmp_path):
    for model in ladder.MODELS:
        drawing = {"ratio": 1.01, "low": 1.0, "high": 1.02, "n": 20}
        (tmp_path / f"{model}_bf16_cpu.json").write_text(json.dumps({"drawing": drawing}))
    for job in ladder.all_jobs():
        _, arm, seed = re.fullmatch(r"(\w+), (.*), seed (\d)", job.name).groups()
        if job.result == "results.json":
            stages = {"base_direct": make_records(0.5, int(seed), 4)}
            stages |= {"trained_direct": make_records(1.0 if arm == "agsm" else 0.5, int(seed) + 100, 4)}
            finish(job, stages, width=192, pictures=seed == "0")
    pretend([job for job in ladder.all_jobs() if job.result != "results.json"])
    for job in ladder.all_jobs():
        job.begin()  # once more, since what it takes is there by now
    ladder.write_table()
    ladder.write_figure()
    ladder.write_pictures()
    assert all((tmp_path / f"{model}.png").is_file() for model in ladder.MODELS)
    text = (tmp_path / "table.md").read_text()
    rows = rows_of(text)
    assert "**" in rows["agsm"][1] and "**" not in rows["softrepa"][1] and (tmp_path / "figure.png").is_file()
    assert text.count("\n## sd") == 2 and text.count("takes 1.010 [1.000, 1.020] times as long") == 2


@MISSING_OR_STALE
def test_the_alignment_ladder_refuses_a_job_that_is_not_done_or_stale(ladder, how, said):
    pretend(ladder.all_jobs())
    damage(next(job for job in ladder.all_jobs() if job.name == f"sd_tiny, {ladder.TUNED}, seed 2"), how)
    with pytest.raises(UserError, match=said):
        ladder.write_table()


def test_the_alignment_ladder_refuses_what_other_tokens_have_drawn(ladder):
    pretend(ladder.all_jobs())
    job = next(job for job in ladder.all_jobs() if job.name == f"sd_tiny, {ladder.TRANSFERRED}, seed 0")
    job.takes[1].write_text("other tokens")
    with pytest.raises(UserError, match=r"made from another .*agsm/seed_0/soft_tokens.safetensors"):
        ladder.write_table()


@pytest.fixture
def edits(tmp_path, monkeypatch):
    module = loaded("edit_shapes", tmp_path, monkeypatch)
    monkeypatch.setattr(module, "TRAINED", tmp_path / "tokens")
    return module


def test_the_edit_table_says_what_the_runs_say(edits, tmp_path):
    """AGSM mends every second removal that fails untouched and costs 2 dB there; nothing else changes."""
    pretend(edits.jobs())
    for arm, seed in product(edits.study.arms, edits.study.seeds):
        folder = edits.study.run_folder(arm, seed)
        rows = []
        for kind in edits.KINDS:
            mended = arm == "agsm" and kind == "remove"
            (folder / f"{kind}.png").write_bytes(b"a picture")
            rows += [
                {"kind": kind, "strict": n % 4 == 0 or (mended and n % 4 == 1), "psnr_kept": 20.0 + n - 2 * mended}
                for n in range(edits.CASES)
            ]
        (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "edits.json").write_text(json.dumps({"flow": {"steps": 50}}))
    edits.write_table()
    lines = (tmp_path / "table.md").read_text().splitlines()
    table = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split(" | ") for line in lines}
    assert table["remove", "agsm"][3].startswith("**+25.0") and table["remove", "agsm"][4] == "+25.0 [seeds agree]"
    assert table["remove", "agsm"][6] == "-2.0 [-2.0, -2.0]" and table["remove", "agsm"][2].startswith("50.0")
    assert table["add", "agsm"][3] == table["remove", "softrepa"][3] == "+0.0 [+0.0, +0.0]"
    assert (tmp_path / "remove.png").is_file()


@MISSING_OR_STALE
def test_the_edits_refuse_a_job_that_is_not_done_or_stale(edits, how, said):
    pretend(edits.jobs())
    damage(edits.job("softrepa", 1), how)
    with pytest.raises(UserError, match=said):
        edits.write_table()


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    return loaded("gaussianity", tmp_path, monkeypatch, "alignment")


def test_every_arm_of_the_reward_alignment_composes_and_the_rivals_cost_what_is_said(rewards):
    configs = {}
    for (arm, seed), job in rewards.jobs().items():
        if seed == 0:
            configs[arm] = composed(*(word for word in job.command[1:] if not word.startswith("hydra.")))
            assert configs[arm].task._target_.endswith("optimize_noise.run")
    none = configs["none"]
    assert none.method.optimizer.lr == rewards.LR and rewards.LR in rewards.STEPS
    assert configs["none, published step"].method.optimizer.lr == rewards.PUBLISHED
    assert configs[rewards.HACKED].data.prompts_per_task == 8 and none.data.prompts_per_task == 11
    pictures, gradients = 51, none.method.iterations
    assert gradients == pictures - 1
    assert configs[rewards.RIVAL].method.evaluations == pictures + 2 * gradients


def search(module, arm: str, seed: int, model: str = "0") -> None:
    """A finished job of two noises for six prompts, and what is kept of it.

    Without a regulariser 4 nats up and a case in four lost by the judge's verdict, MPGR 2 nats and two in four won, the
    rest 1 nat.
    """
    gains = {"none": (4.0, (1, 0, 0, 0)), "MPGR (fresh shuffle)": (2.0, (1, 1, 1, 1))}
    gain, won = gains.get(arm, (1.0, (1, 1, 0, 0)))
    job = module.study.job(arm, seed)
    for number in range(12):
        folder = job.folder / "noise" / f"{number:05d}"
        folder.mkdir(parents=True)
        start, strict = -5.0 + 0.1 * seed + number, (1.0, 1.0, 0.0, 0.0)[number % 4]
        health = {f"health/{name}": 1.0 for name in module.HEALTH}
        initial = {"step": 0, "target": start, "watch/oracle/strict": strict, "watch/oracle/score": strict, **health}
        after = initial | {"step": 50, "target": start + gain, "watch/oracle/strict": float(won[number % 4])}
        ends = {"initial": initial, "best": after} | ({} if arm in module.SEARCHES else {"last": after})
        (folder / "case.json").write_text(json.dumps({"prompt_id": f"p{number // 2}", **ends}))
        rows = [row | {"cosine_to_start": 1.0 - row["step"] / 100} for row in (initial, {"step": 1}, after)]
        (folder / "trajectory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = {end: {"metrics": {"diversity": {"mean": 0.1}}} for end in ends}
    results = {"weights_sha256": {"model": model}, "steps": 50, "stages": stages}
    (job.folder / "results.json").write_text(json.dumps(results))
    provenance = {"git_commit": "0123456789", "device": "a made-up machine"}
    (job.folder / "provenance.json").write_text(json.dumps(provenance))
    (job.folder / "strips").mkdir()
    (job.folder / "strips" / "00000.png").write_bytes(b"a picture")
    job.begin()
    module.keep(job, arm, seed)


def test_the_reward_alignment_table_says_what_the_searches_say(rewards, tmp_path):
    for arm, seed in rewards.jobs():
        search(rewards, arm, seed)
    shutil.rmtree(tmp_path / "outputs")  # what is kept is enough
    rewards.check_kept(list(rewards.jobs()))
    rewards.write_steps()
    rewards.write_table()
    rewards.write_figures()
    steps = (tmp_path / "steps.md").read_text()
    first, second = (tmp_path / "alignment.md").read_text().split("\n## ")
    rows = rows_of(first)
    assert set(rewards.ARMS) <= set(rows)
    none, mpgr, rival = rows["none"], rows["MPGR (fresh shuffle)"], rows[rewards.RIVAL]
    assert none[1] == "+4.0 [+4.0, +4.0]" and mpgr[1] == "+2.0 [+2.0, +2.0]" and rival[5] == rival[6] == ""
    assert none[2].startswith("**-25.0") and mpgr[2].startswith("**+50.0") and rival[2] == "+0.0 [+0.0, +0.0]"
    assert "+1.0 [+1.0, +1.0]" in mpgr[5] and mpgr[6].startswith("**+50.0") and mpgr[7].startswith("**+75.0")
    assert "| none | 0.500 | 1.00 (" in second
    assert (
        "| MPGR, lr 50 | +1.0 [+1.0, +1.0] | +1.0 [+1.0, +1.0] | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | 0 % | +0.0"
        in steps
    )
    assert all((tmp_path / name).is_file() for name in ("alignment.png", "hacking.png", "strip.png"))


def test_reward_alignment_refuses_jobs_of_different_models(rewards):
    names = [("none", 0), ("KL", 2)]
    for model, name in enumerate(names):
        search(rewards, *name, model=str(model))
    with pytest.raises(UserError, match="2 different models"):
        rewards.check_kept(names)


def test_reward_alignment_refuses_what_was_not_kept_or_was_made_by_another_command(rewards, monkeypatch):
    search(rewards, "KL", 0)
    with pytest.raises(UserError, match="no table: 1 of 2 jobs are not done, the first is KL, seed 1"):
        rewards.check_kept([("KL", 0), ("KL", 1)])
    monkeypatch.setitem(rewards.study.arms, "KL", ["regularizer=prno"])
    with pytest.raises(UserError, match="kl_seed_0.json.gz was made by python .*regularizer=kl.*: delete it"):
        rewards.check_kept([("KL", 0)])


def test_the_committed_table_of_the_reward_alignment_is_what_its_committed_figures_give(rewards, tmp_path, monkeypatch):
    committed = ROOT / "experiments" / "gaussianity"
    (tmp_path / "alignment").symlink_to(committed / "alignment")
    rewards.check_kept(list(rewards.jobs()))
    monkeypatch.setattr(rewards, "hacking_figure", lambda *figure: None)
    rewards.write_table()
    rewards.write_steps()
    for name in ("alignment.md", "steps.md"):
        assert (tmp_path / name).read_text() == (committed / name).read_text()


class Ladder:
    """The modules of IRG's ladder, with jobs and tables under a folder of the test's."""

    def __init__(self, folder: Path, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "experiments" / "irg_shapes")
        names = ("arms", "controls", "rows", "report", "figures")
        self.arms, self.controls, self.rows, self.report, self.figures = map(importlib.import_module, names)
        monkeypatch.setattr(self.arms, "DATA", folder / "irgl")
        study = replace(self.arms.study, folder=folder / "outputs")
        for module in (self.arms, self.controls, self.report, self.figures):
            monkeypatch.setattr(module, "study", study)
        for module in (self.report, self.figures):
            monkeypatch.setattr(module, "HERE", folder)


@pytest.fixture
def irg(tmp_path, monkeypatch):
    return Ladder(tmp_path, monkeypatch)


def test_every_job_of_irgs_ladder_composes(irg):
    arms = irg.arms
    configs = {}
    for arm in (*arms.ARMS, *arms.MEASURED):
        cfg = composed(*(word for word in arms.job(arm, 1).command[1:] if not word.startswith("hydra.")))
        trains = cfg.task_name in ("irg_shapes", "irg_grpo_shapes") and cfg.task._target_.endswith("train.run")
        assert cfg.seed == 1 and (arm in arms.ARMS) == trains
        configs[arm] = cfg
    steps = {arm: configs[arm].trainer.max_steps for arm in arms.ARMS}
    assert steps["good"] == steps["trajectories"] == steps["stage1"] + steps["six"]
    assert steps["grpo"] == steps["grpo_random"]
    assert {*arms.LADDER, *arms.LONGER} == {*arms.ARMS, *arms.MEASURED, *arms.TOLD, *arms.CONTEXTS}


def test_jobs_of_irgs_ladder_take_the_checkpoint_that_their_command_names(irg):
    arms = irg.arms
    six = arms.job("six", 2)
    (checkpoint,) = six.takes
    assert checkpoint == arms.job("stage1", 2).folder / "checkpoints" / "last.ckpt"
    assert f"method.start_from='{checkpoint}'" in six.command and [job.name for job in six.needs] == ["stage1, seed 2"]
    told, contexts = arms.job("long_told_world", 0), arms.job("contexts", 2)
    assert told.command[1:] == (str(arms.job("long", 0).folder), "world", str(told.folder))
    assert [job.name for job in contexts.needs] == ["six, seed 2", "good, seed 0"]  # a seed that it has not seen
    assert contexts.takes[1] == arms.DATA / "janus_tiny_4096_seed0" / "manifest.json"
    assert [job.name for job in arms.job("trajectories", 1).needs] == ["good, seed 1"]


@pytest.fixture
def two_rungs(irg, tmp_path):
    """Only two arms are done: six modes mend every wrong picture, and the recogniser knows the judge."""
    rng = np.random.default_rng(0)
    stages = {
        "good": ("base_direct", "base_plan", "trained_turn1"),
        "six": ("trained_turn1", "trained_turn2", "trained_stopped", "trained_chosen"),
    }
    for job in irg.arms.jobs(["good", "six"]):
        arm, seed = job.name.split(", seed ")
        records = {}
        for stage in stages[arm]:
            rate = 1.0 if stage in ("trained_turn2", "trained_chosen") else 0.5
            records[stage] = make_records(rate, int(seed), per_task=4, effect=0.0)
            for row in records[stage]:
                row |= {"judge_score": float(row["strict"]), "unfinished": False, "text_tokens": 9, "seconds": 0.5}
                if stage != "trained_turn1":
                    row |= {"named": [], "faults": [], "says_stop": rng.random() < 0.5}
        finish(job, records, pictures=job.name == "six, seed 0")
        head = "step,text/loss,image/loss,val/turn1,val/turn2,val/names_defect,val/false_alarms"
        (job.folder / "metrics.csv").write_text(f"{head}\n0,1,1,.5,.5,.5,.5\n1,1,1,.5,.5,.5,.5\n")
    manifest = irg.arms.data(0, 4096) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"counts": {"improving_full_learning": 7}}))
    return irg


def mended_by_another(first: list[dict]) -> float:
    """Of the prompts' wrong pictures, the share whose twin is right."""
    strict = {(row["prompt_id"], row["sample_index"]): row["strict"] for row in first}
    return float(np.mean([strict[prompt, 1 - sample] for (prompt, sample), right in strict.items() if not right]))


def test_irgs_table_says_what_the_runs_say_and_names_what_has_not_run(two_rungs, tmp_path):
    two_rungs.report.write_table()
    two_rungs.figures.write_figure()
    two_rungs.figures.write_strips()
    text = (tmp_path / "table.md").read_text()
    rows = rows_of(text)
    assert rows["six modes: I2"][1].startswith("100.0") and "trajectories" not in "".join(rows)
    assert "**" in rows["six modes: I2 - I1"][1] and rows["six modes"][1].startswith("100.0")
    records = two_rungs.controls.records
    by_chance = 100 * np.mean([mended_by_another(first) for first in records("six", "trained_turn1")])
    control = rows["six modes, another I1 in place of I2 (control)"]
    assert control[1].startswith(f"{by_chance:.1f} [")
    assert control[2] == "" and control[3] == control[1] and control[5] == control[6] == ""
    assert "Not run yet, and left out: stage1, trajectories" in text
    assert (tmp_path / "figure.png").is_file() and (tmp_path / "strips.png").is_file()


def test_irgs_controls_are_made_of_its_first_pictures(two_rungs):
    controls, overall = two_rungs.controls, two_rungs.report.overall
    first = controls.records("six", "trained_turn1")[0]
    preferred = controls.records("six", controls.BEST_OF_TWO)[0]
    assert len(first) == len(preferred) and overall(first) < overall(preferred) < 1
    for prompt in {row["prompt_id"] for row in first}:
        verdicts = [row["strict"] for row in first if row["prompt_id"] == prompt]
        assert [row["strict"] for row in preferred if row["prompt_id"] == prompt] == [any(verdicts)] * 2
    redrawn = controls.records("six", controls.WHERE_WRONG)[0]
    assert overall(redrawn) == overall(preferred)  # there the recogniser knows the judge
    stops = {controls.key(row): row["says_stop"] for row in controls.records("six", "trained_turn2")[0]}
    strict = {controls.key(row): row["strict"] for row in first}
    wanted = [strict[prompt, n if stops[prompt, n] else 1 - n] for prompt, n in map(controls.key, first)]
    assert [row["strict"] for row in controls.records("six", controls.WHERE_FLAGGED)[0]] == wanted


@MISSING_OR_STALE
def test_irgs_ladder_refuses_a_job_that_is_not_done_or_stale(irg, how, said):
    pretend(irg.arms.jobs(["good", "six"]))
    damage(irg.arms.job("six", 1), how)
    with pytest.raises(UserError, match=said):
        irg.report.write_table()
