"""The experiments' runners: tables and figures from made-up runs, and their arms compose."""

import csv
import importlib.util
import json
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from t2i_rl.evaluation.records import write_records
from tests.support.commands import composed
from tests.support.made_up_run import make_records, make_run

ROOT = Path(__file__).parents[1]


def loaded(name: str, tmp_path, monkeypatch, script: str = "run"):
    """The runner of an experiment, with its jobs and its table under `tmp_path`."""
    spec = importlib.util.spec_from_file_location(f"{name}_{script}", ROOT / "experiments" / name / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return loaded("iris_shapes", tmp_path, monkeypatch)


def finished(module, arm: str, seed: int, rate: float) -> None:
    """A finished job with a made-up log in which the plans' KL grows by 0.004 a step."""
    folder = make_run(module.folder(arm, seed), seed=seed, rate=rate, per_task=4)
    results = json.loads((folder / "results.json").read_text())
    results["benchmark"] |= {"n_prompts": 12, "samples_per_prompt": 2}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "provenance.json").write_text(json.dumps({"git_commit": "0123456789", "device": "a made-up machine"}))
    for stage in ("base_plan", "trained_plan"):
        np.save(folder / "evaluation" / stage / "features.npy", np.random.default_rng(seed).random((48, 4)))
    rng = np.random.default_rng(seed)
    with (folder / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, ["step", "watch/oracle", *module.LOGGED])
        writer.writeheader()
        for step in range(20):
            values = {name: rng.random() for name in module.LOGGED} | {"text/kl": 0.004 * step}
            accuracy = 0.5 if arm == "random gentle" else 0.5 + 0.01 * step
            writer.writerow({"step": step, "watch/oracle": accuracy, **values})


def test_table_and_figure_say_what_the_runs_say(runner, tmp_path):
    for arm in runner.ARMS:
        for seed in runner.SEEDS:
            finished(runner, arm, seed, 1.0 if arm == "oracle" else 0.5)
    runner.write_table()
    runner.write_figure()
    text = (tmp_path / "table.md").read_text()
    against_base, against_control = (
        {line.split(" | ")[0].strip("| "): line.split(" | ") for line in part.splitlines() if line.startswith("| ")}
        for part in text.split("## ")[1:3]
    )
    assert "**" in against_base["oracle"][1] and "**" not in against_base["random"][1]
    assert (
        set(runner.ARMS) < set(against_base)
        and runner.CONTROL not in against_control
        and "nsc gentle" in against_control
    )
    at_kl = text.split("## ")[-1]
    # the mean of steps i to i+4 is 0.004 (i + 2): 0.01 is reached at i=1, 0.03 at i=6, 0.1 never
    assert "| oracle | +3.0 [seeds agree] | +8.0 [seeds agree] | not reached |" in at_kl
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_every_arm_composes(runner):
    for overrides in runner.ARMS.values():
        composed("experiment=iris_shapes", *overrides)


@pytest.fixture
def ladder(tmp_path, monkeypatch):
    return loaded("alignment_shapes", tmp_path, monkeypatch)


def test_every_rung_of_the_alignment_ladder_composes_and_lora_is_as_large_as_the_tokens(ladder):
    from hydra.utils import instantiate

    for model in ladder.MODELS:
        sizes = {}
        for arm, settings in ladder.TRAINED.items():
            extra = (
                [f"method.lora={ladder.LORA[model]}"] if arm == "lora" else ["data.path=made"] if arm == "dpo" else []
            )
            cfg = composed("experiment=alignment_shapes", f"model={model}", *settings, *extra)
            assert cfg.trainer.max_steps == 300 and list(cfg.evaluation.stages) == ["base_direct", "trained_direct"]
            if arm in ("denoising", "lora"):
                method = instantiate(cfg.method, model=instantiate(cfg.model))
                sizes[arm] = sum(part.numel() for part in method.parameters() if part.requires_grad)
        assert 0.85 < sizes["lora"] / sizes["denoising"] < 1.15, sizes


@pytest.mark.slow
def test_the_alignment_table_says_what_the_runs_say(ladder, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "BENCH", tmp_path)
    for model in ladder.MODELS:
        drawing = {"ratio": 1.01, "low": 1.0, "high": 1.02, "n": 20}
        (tmp_path / f"{model}_bf16_cpu.json").write_text(json.dumps({"drawing": drawing}))
        for seed in ladder.SEEDS:
            for arm in (*ladder.ARMS, ladder.TUNED, *(f"guidance {scale}" for scale in ladder.GUIDANCE)):
                folder = make_run(
                    ladder.folder(model, arm, seed), seed=seed, rate=1.0 if arm == "agsm" else 0.5, per_task=4
                )
                for plan, direct in (("base_plan", "base_direct"), ("trained_plan", "trained_direct")):
                    (folder / "evaluation" / plan).rename(folder / "evaluation" / direct)
                    np.save(
                        folder / "evaluation" / direct / "features.npy", np.random.default_rng(seed).random((48, 192))
                    )
                results = json.loads((folder / "results.json").read_text())
                results["benchmark"] |= {"n_prompts": 12, "samples_per_prompt": 2}
                (folder / "results.json").write_text(json.dumps(results))
                (folder / "provenance.json").write_text(
                    json.dumps({"git_commit": "0123456789", "device": "a made-up machine"})
                )
    ladder.write_table()
    ladder.write_figure()
    ladder.write_pictures()
    assert all((tmp_path / f"{model}.png").is_file() for model in ladder.MODELS)
    lines = (tmp_path / "table.md").read_text().splitlines()
    row = {arm: next(line for line in lines if line.startswith(f"| {arm} |")).split(" | ") for arm in ladder.ARMS}
    assert "**" in row["agsm"][1] and "**" not in row["softrepa"][1] and (tmp_path / "figure.png").is_file()
    assert sum(line.startswith("## sd") for line in lines) == 2
    assert sum("takes 1.010 [1.000, 1.020] times as long" in line for line in lines) == 2


def test_the_edit_table_says_what_the_runs_say(tmp_path, monkeypatch):
    """AGSM mends every second removal that fails untouched and costs 2 dB there; nothing else changes."""
    edits = loaded("edit_shapes", tmp_path, monkeypatch)
    for arm in edits.ARMS:
        for seed in edits.SEEDS:
            folder = edits.OUTPUTS / arm / f"seed_{seed}"
            folder.mkdir(parents=True)
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
            (folder / "provenance.json").write_text(json.dumps({"git_commit": "0123456789"}))
    edits.write_table()
    lines = (tmp_path / "table.md").read_text().splitlines()
    table = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split(" | ") for line in lines}
    assert table["remove", "agsm"][3].startswith("**+25.0") and table["remove", "agsm"][4] == "+25.0 [seeds agree]"
    assert table["remove", "agsm"][6] == "-2.0 [-2.0, -2.0]" and table["remove", "agsm"][2].startswith("50.0")
    assert table["add", "agsm"][3] == table["remove", "softrepa"][3] == "+0.0 [+0.0, +0.0]"
    assert (tmp_path / "remove.png").is_file()


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    return loaded("gaussianity", tmp_path, monkeypatch, "alignment")


def test_every_arm_of_the_reward_alignment_composes_and_the_rivals_cost_what_is_said(rewards):
    for settings in (rewards.ARMS | rewards.VALIDATION).values():
        assert composed(*settings).task._target_.endswith("optimize_noise.run")
    none = composed(*rewards.ARMS["none"])
    assert none.method.optimizer.lr == rewards.LR and rewards.LR in rewards.STEPS
    assert composed(*rewards.ARMS["none, published step"]).method.optimizer.lr == rewards.PUBLISHED
    pictures, gradients = 51, none.method.iterations
    assert gradients == pictures - 1
    assert composed(*rewards.ARMS[rewards.RIVAL]).method.evaluations == pictures + 2 * gradients


def searched(module, arm: str, seed: int, model: str = "0") -> None:
    """A finished job of two noises for six prompts: without a regulariser 4 nats up and a case in four lost by the judge's verdict, MPGR 2 nats and two in four won, the rest 1 nat."""
    gain, won = {"none": (4.0, (1, 0, 0, 0)), "MPGR (fresh shuffle)": (2.0, (1, 1, 1, 1))}.get(arm, (1.0, (1, 1, 0, 0)))
    out = module.folder(arm, seed)
    for number in range(12):
        place = out / "noise" / f"{number:05d}"
        place.mkdir(parents=True)
        start, strict = -5.0 + 0.1 * seed + number, (1.0, 1.0, 0.0, 0.0)[number % 4]
        health = {f"health/{name}": 1.0 for name in module.HEALTH}
        initial = {"step": 0, "target": start, "watch/oracle/strict": strict, "watch/oracle/score": strict, **health}
        after = initial | {"step": 50, "target": start + gain, "watch/oracle/strict": float(won[number % 4])}
        ends = {"initial": initial, "best": after} | ({} if arm in module.SEARCHES else {"last": after})
        (place / "case.json").write_text(json.dumps({"prompt_id": f"p{number // 2}", **ends}))
        rows = [row | {"cosine_to_start": 1.0 - row["step"] / 100} for row in (initial, {"step": 1}, after)]
        (place / "trajectory.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = {end: {"metrics": {"diversity": {"mean": 0.1}}} for end in ends}
    results = {"weights_sha256": {"model": model}, "steps": 50, "stages": stages}
    (out / "results.json").write_text(json.dumps(results))
    (out / "provenance.json").write_text(json.dumps({"git_commit": "0123456789", "device": "a made-up machine"}))
    (out / "strips").mkdir()
    (out / "strips" / "00000.png").write_bytes(b"a picture")
    module.keep(arm, seed)


def test_the_reward_alignment_table_says_what_the_searches_say(rewards, tmp_path):
    for arm, seed in [(arm, 0) for arm in rewards.VALIDATION] + list(product(rewards.ARMS, rewards.SEEDS)):
        searched(rewards, arm, seed)
    shutil.rmtree(rewards.OUTPUTS)  # what is kept is enough
    rewards.write_steps()
    rewards.write_table()
    rewards.write_figures()
    steps = (tmp_path / "steps.md").read_text()
    first, second = (tmp_path / "alignment.md").read_text().split("\n## ")
    row = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in first.splitlines() if line.startswith("| ")}
    assert set(rewards.ARMS) <= set(row)
    none, mpgr, rival = row["none"], row["MPGR (fresh shuffle)"], row[rewards.RIVAL]
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
    for arm, seed in product(rewards.ARMS, rewards.SEEDS):
        searched(rewards, arm, seed, model="1" if (arm, seed) == ("KL", 2) else "0")
    with pytest.raises(SystemExit, match="2 different models"):
        rewards.check_one_model()


@pytest.fixture
def irg(tmp_path, monkeypatch):
    """The arms and the report of IRG's ladder, with jobs and tables under `tmp_path`."""
    monkeypatch.syspath_prepend(ROOT / "experiments" / "irg_shapes")
    arms, report = importlib.import_module("arms"), importlib.import_module("report")
    monkeypatch.setattr(arms, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(arms, "DATA", tmp_path / "irgl")
    monkeypatch.setattr(report, "HERE", tmp_path)
    return arms, report


def test_every_job_of_irgs_ladder_composes(irg):
    arms, _ = irg
    for arm in (*arms.ARMS, *arms.MEASURED):
        settings = arms.command_of(arm, 1)[1:]
        cfg = composed(*(item for item in settings if not item.startswith("hydra.")))
        assert cfg.seed == 1 and (arm in arms.ARMS) == (cfg.task_name in ("irg_shapes", "irg_grpo_shapes") and cfg.task._target_.endswith("train.run"))  # fmt: skip
    steps = {arm: composed(*arms.command_of(arm, 0)[1:-1]).trainer.max_steps for arm in arms.ARMS}
    assert steps["good"] == steps["trajectories"] == steps["stage1"] + steps["six"] and steps["grpo"] == steps["grpo_random"]  # fmt: skip
    assert {*arms.LADDER, *arms.LONGER} == {*arms.ARMS, *arms.MEASURED, *arms.TOLD, *arms.CONTEXTS}


def test_a_job_goes_on_where_it_stopped_and_refuses_what_another_checkpoint_made(irg, monkeypatch):
    arms, _ = irg
    ran = []
    monkeypatch.setattr(arms, "git_commit", lambda: "0123456")
    monkeypatch.setattr(
        arms.subprocess, "run", lambda command, **_: ran.append(command) or SimpleNamespace(returncode=0)
    )
    source, own = (arms.folder(arm, 0) / "checkpoints" / "last.ckpt" for arm in ("stage1", "six"))
    source.parent.mkdir(parents=True)
    source.write_bytes(b"weights")
    arms.run_job(("six", 0))
    assert f"method.start_from='{source}'" in ran[0] and "ckpt_path=last" not in ran[0]
    own.parent.mkdir(parents=True)
    own.touch()
    arms.run_job(("six", 0))
    assert ran[1] == [*ran[0], "ckpt_path=last"]
    (own.parents[1] / "results.json").touch()
    arms.run_job(("six", 0))
    assert len(ran) == 2
    source.write_bytes(b"other weights")
    with pytest.raises(SystemExit, match="delete it"):
        arms.run_job(("six", 0))
    source.unlink()
    arms.run_job(("six", 0))
    assert len(ran) == 2  # it is done, whatever became of what it took


def test_arms_are_asked_for_by_name_and_wait_for_what_they_take(irg, monkeypatch):
    arms, _ = irg
    ran = []
    monkeypatch.setattr(arms, "run_job", ran.append)
    with pytest.raises(SystemExit, match="six takes what stage1 makes, which is not done"):
        arms.run_all(["six"], 1)
    arms.run_all(["six", "good", "stage1"], 1)
    assert ran == [(arm, seed) for arm in ("good", "stage1", "six") for seed in arms.SEEDS]
    for seed in arms.SEEDS:
        arms.folder("long", seed).mkdir(parents=True)
        (arms.folder("long", seed) / "results.json").touch()
    with pytest.raises(SystemExit, match="long_contexts takes what long makes"):  # the weights are gone
        arms.run_all(["long_contexts"], 1)
    for seed in arms.SEEDS:
        (arms.folder("long", seed) / "checkpoints").mkdir()
        (arms.folder("long", seed) / "checkpoints" / "last.ckpt").touch()
    arms.run_all(["long_contexts"], 1)
    assert ran[-1] == ("long_contexts", 2)


def mended_by_another(first: list[dict]) -> float:
    """Of the prompts' wrong pictures, the share whose twin is right."""
    strict = {(row["prompt_id"], row["sample_index"]): row["strict"] for row in first}
    return float(np.mean([strict[prompt, 1 - sample] for (prompt, sample), right in strict.items() if not right]))


def test_irgs_table_says_what_the_runs_say_and_names_what_has_not_run(irg, tmp_path):
    """Six modes mend every wrong picture, the recogniser knows the judge; only two arms are there."""
    arms, report = irg
    rng = np.random.default_rng(0)
    stages = {"good": ("base_direct", "base_plan", "trained_turn1"), "six": ("trained_turn1", "trained_turn2", "trained_stopped", "trained_chosen")}  # fmt: skip
    for arm, seed in product(stages, arms.SEEDS):
        place = make_run(arms.folder(arm, seed), seed=seed, per_task=4)
        for stage in stages[arm]:
            rate = 1.0 if stage in ("trained_turn2", "trained_chosen") else 0.5
            records = make_records(rate, seed, per_task=4, effect=0.0)
            for row in records:
                row |= {"judge_score": float(row["strict"]), "unfinished": False, "text_tokens": 9, "seconds": 0.5}
                row |= {} if stage == "trained_turn1" else {"named": [], "faults": [], "says_stop": rng.random() < 0.5}
            (place / "evaluation" / stage / "images").mkdir(parents=True, exist_ok=True)
            for row in records:
                shutil.copy(place / "evaluation" / "trained_plan" / "images" / "00000.png", place / "evaluation" / stage / row["image"])  # fmt: skip
            write_records(place / "evaluation" / stage / "records.jsonl", records)
            np.save(place / "evaluation" / stage / "features.npy", rng.random((48, 4)))
        results = json.loads((place / "results.json").read_text())
        results["benchmark"] |= {"n_prompts": 24, "samples_per_prompt": 2}
        (place / "results.json").write_text(json.dumps(results))
        (place / "provenance.json").write_text(json.dumps({"device": "a made-up machine"}))
        (place / "job.json").write_text(json.dumps({"commit": "0123456789"}))
        (place / "metrics.csv").write_text("step,text/loss,image/loss,val/turn1,val/turn2,val/names_defect,val/false_alarms\n0,1,1,.5,.5,.5,.5\n1,1,1,.5,.5,.5,.5\n")  # fmt: skip
    manifest = tmp_path / "irgl" / "janus_tiny_4096_seed0" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"counts": {"improving_full_learning": 7}}))
    report.write_table()
    report.write_figure()
    report.write_strips()
    text = (tmp_path / "table.md").read_text()
    row = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}  # fmt: skip
    assert row["six modes: I2"][1].startswith("100.0") and "trajectories" not in "".join(row)
    first, second = (report.records("six", stage)[0] for stage in ("trained_turn1", report.BEST_OF_TWO))
    assert len(first) == len(second) and report.overall(first) < report.overall(second) < 1
    for prompt in {each["prompt_id"] for each in first}:
        pair = [each["strict"] for each in first if each["prompt_id"] == prompt]
        assert [each["strict"] for each in second if each["prompt_id"] == prompt] == [any(pair)] * 2
    redrawn = report.records("six", report.WHERE_WRONG)[0]
    assert report.overall(redrawn) == report.overall(second)  # there the recogniser knows the judge
    control = row["six modes, another I1 in place of I2 (control)"]
    assert control[1].startswith(
        f"{100 * np.mean([mended_by_another(rows) for rows in report.records('six', 'trained_turn1')]):.1f} ["
    )
    assert control[2] == "" and control[3] == control[1] and control[5] == control[6] == ""
    kept = report.records("six", report.WHERE_FLAGGED)[0]
    stops = {report.key(each): each["says_stop"] for each in report.records("six", "trained_turn2")[0]}
    verdicts = {report.key(each): each["strict"] for each in first}
    assert [each["strict"] for each in kept] == [verdicts[name, sample if stops[name, sample] else 1 - sample] for name, sample in map(report.key, first)]  # fmt: skip
    assert "**" in row["six modes: I2 - I1"][1] and row["six modes"][1].startswith("100.0")
    assert "Not run yet, and left out: stage1, trajectories" in text and (tmp_path / "figure.png").is_file()
