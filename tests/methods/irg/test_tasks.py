"""IRG from the command line on a small saved checkpoint of the real class: data, training, a resume, drawing,
evaluation, GRPO on top."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from t2i_rl.methods.irg.files import load_trajectory
from t2i_rl.methods.irg.toy_format import read_toy
from tests.support.commands import call
from tests.support.tiny import save_tiny_janus

SMALL = [
    "model=janus",
    "model.rollout.max_rows=null",
    "method.interleave.max_tokens=6",
    "method.interleave.retries=0",
    "model.max_plan_tokens=8",
    "trainer=cpu",
    "benchmark.prompts_per_task=1",
    "benchmark.samples_per_prompt=2",
    "~callbacks.progress",
    "model.guidance_scale=3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def run(monkeypatch, place, folder, *arguments: str, small=SMALL) -> None:
    assert call(monkeypatch, place, *small, f"path={folder}", *arguments) == 0


def test_a_small_checkpoint_of_the_real_class_goes_all_the_way(folder, tmp_path, monkeypatch):
    train = [
        "method=irg",
        "data.count=8",
        "data.batch_size=4",
        "data.maker.shard_size=4",
        "callbacks.checkpoint.every_n_steps=1",
        "callbacks.sample_grid.every_n_steps=2",
    ]
    run(monkeypatch, tmp_path, folder, *train, "trainer.max_steps=2", "hydra.run.dir=one")
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(results["stages"]) == {"base_direct", "base_plan", "trained_turn1", "trained_turn2", "trained_stopped"}
    assert results["headline"]["a"] == "base_plan" and results["headline"]["b"] == "trained_turn2"
    report = (tmp_path / "one" / "report.html").read_text()
    assert "What each turn did" in report and "<br>plan: " in report and "<br>reflection: " in report
    assert {path.name for path in (tmp_path / "one" / "samples").iterdir()} == {"step_000000.png", "step_000002.png"}
    with (tmp_path / "one" / "metrics.csv").open() as rows:
        logged = list(csv.DictReader(rows))
    assert any(row["val/turn2"] for row in logged) and any(row["image/loss"] for row in logged)
    data = next((tmp_path / "outputs" / "irgl").iterdir())
    modes = {mode for mode, _ in read_toy(data)}
    assert len(modes) == 6 and json.loads((data / "manifest.json").read_text())["counts"]["initial_full_learning"] == 8

    checkpoint = tmp_path / "one" / "checkpoints" / "last.ckpt"
    run(
        monkeypatch,
        tmp_path,
        folder,
        "task=generate",
        "method=irg",
        f"ckpt_path={checkpoint}",
        "prompt=a red circle",
        "num_images=2",
        "method.interleave.rounds=3",
        "method.interleave.policy=window",
        "hydra.run.dir=drawn",
    )
    first = load_trajectory(tmp_path / "drawn" / "trajectories" / "00000")
    assert [each.role for each in first.segments] == [
        "prompt",
        "think",
        "draw",
        "reflect",
        "redraw",
        "reflect",
        "redraw",
    ]
    assert first.settings["rounds"] == 3 and first.settings["policy"] == "window" and first.seed is not None
    rows = [json.loads(line) for line in (tmp_path / "drawn" / "images.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(
        (tmp_path / "drawn" / name).is_file() for row in rows for name in [*row["images"], row["answer"]]
    )
    assert (tmp_path / "drawn" / "report.html").read_text().count("<img") == 2

    run(
        monkeypatch,
        tmp_path,
        folder,
        "task=evaluate",
        "method=irg",
        f"ckpt_path={checkpoint}",
        "evaluation.stages=[trained_turns]",
        "hydra.run.dir=judged",
        "+reward@method.judge=soft_oracle",
    )
    judged = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert set(judged["stages"]) == {"trained_turn1", "trained_turn2", "trained_stopped", "trained_chosen"}
    for turn in ("trained_turn1", "trained_turn2"):
        assert judged["stages"][turn]["metrics"]["overall"] == results["stages"][turn]["metrics"]["overall"]

    run(monkeypatch, tmp_path, folder, "task=export", "method=irg", f"ckpt_path={checkpoint}", "task.out=exported")
    exported, saved = load_file(tmp_path / "exported" / "model.safetensors"), torch.load(checkpoint, weights_only=True)
    for name, value in saved["irg"]["average"].items():
        assert torch.equal(exported.get(name.removeprefix("interleaved.janus.model."), value), value), name

    run(
        monkeypatch,
        tmp_path,
        folder,
        "method=irg_grpo",
        f"method.start_from={checkpoint}",
        "method.group_size=2",
        "data.batch_size=1",
        "data.prompts_per_task=1",
        "trainer.max_steps=2",
        "hydra.run.dir=rl",
        "method.interleave.max_tokens=12",
    )
    rl = json.loads((tmp_path / "rl" / "results.json").read_text())
    assert {"base_turn1", "base_turn2", "trained_turn1", "trained_turn2"} <= set(rl["stages"]) and rl["headline"][
        "a"
    ] == "base_turn2"


def test_a_model_that_writes_nothing_may_draw_weakly(tmp_path, monkeypatch):
    """Then R1 is the teacher's everywhere."""
    assert (
        call(monkeypatch, tmp_path, "task=make_irgl", "model=sd_tiny", "task.count=3", "task.out=made", "trainer=cpu")
        == 0
    )
    rows = list(read_toy(tmp_path / "made"))
    full = {
        mode: [each.segments for name, each in rows if name == mode]
        for mode in ("initial_full_learning", "improving_full_learning")
    }
    thoughts = {first[0].text: first[1].text for first in full["initial_full_learning"]}
    assert full["improving_full_learning"]
    for prompt, thought, weak, *_ in full["improving_full_learning"]:
        assert thought.text == thoughts[prompt.text] and weak.image.shape == (32, 32, 3)


def test_the_papers_config_draws_without_data_and_says_what_has_not_learnt(folder, tmp_path, monkeypatch, capsys):
    drawing = [
        "experiment=irg_janus_pro_7b",
        "task=generate",
        f"model.path={folder}",
        "model.device=null",
        "model.max_plan_tokens=8",
        "trainer=cpu",
        "method.interleave.max_tokens=6",
        "prompt=a red circle",
        "num_images=1",
        "hydra.run.dir=drawn",
    ]
    assert call(monkeypatch, tmp_path, *drawing) == 0
    assert load_trajectory(tmp_path / "drawn" / "trajectories" / "00000").settings["reflection_scale"] == [2.0]
    assert "no ckpt_path" in capsys.readouterr().out
    assert call(monkeypatch, tmp_path, *drawing[:1], "trainer=cpu") != 0
    assert "data.path=..." in capsys.readouterr().err


@pytest.mark.slow
def test_stage_two_goes_on_from_stage_one_and_a_resumed_run_is_whole(folder, tmp_path, monkeypatch):
    common = [
        "method=irg",
        "data.count=8",
        "data.batch_size=4",
        "evaluation.stages=[]",
        "callbacks.checkpoint.every_n_steps=2",
        "~callbacks.sample_grid",
    ]
    run(monkeypatch, tmp_path, folder, *common, "trainer.max_steps=4", "hydra.run.dir=whole")
    run(monkeypatch, tmp_path, folder, *common, "trainer.max_steps=2", "hydra.run.dir=half")
    run(monkeypatch, tmp_path, folder, *common, "trainer.max_steps=4", "hydra.run.dir=half", "ckpt_path=last")
    saved = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "half")]
    for name, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][name]), name
        assert torch.equal(saved[0]["irg"]["average"][name], saved[1]["irg"]["average"][name]), name
    start = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    run(
        monkeypatch,
        tmp_path,
        folder,
        *common,
        "stage=2",
        f"method.start_from={start}",
        "method.scheduler=null",
        "trainer.max_steps=1",
        "hydra.run.dir=two",
    )
    second = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)
    moved = [
        float((second["state_dict"][name] - value).abs().max()) for name, value in saved[0]["irg"]["average"].items()
    ]
    assert 0 < max(moved) < 2e-3  # one step of 5e-4 from the mean


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
def test_two_processes_train_draw_and_judge_as_one(folder, tmp_path, trainer):
    """Shards, packs and averages over ranks change nothing beyond rounding; the turns are drawn from gathered
    weights."""
    from tests.command.test_cli import run as shell

    small = [item for item in SMALL if item != "trainer=cpu"]
    common = [
        "method=irg",
        "data.count=8",
        "data.batch_size=4",
        "trainer.max_steps=2",
        "evaluation.stages=[trained_turns]",
        f"path={folder}",
        "method.optimizer.eps=1e-4",
        *small,
    ]
    for name in ("cpu", trainer):
        done = shell(*common, f"trainer={name}", f"hydra.run.dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    saved = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("cpu", trainer)]
    for name, value in saved[0]["state_dict"].items():
        assert (value - saved[1]["state_dict"][name]).abs().max() < 5e-5, name
        assert (saved[0]["irg"]["average"][name] - saved[1]["irg"]["average"][name]).abs().max() < 5e-5, name
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("cpu", trainer)]
    for stage in ("trained_turn1", "trained_turn2"):
        scores = [each["stages"][stage]["metrics"]["score"]["mean"] for each in results]
        assert scores[0] == pytest.approx(scores[1], abs=0.05)


@pytest.mark.slow
def test_rl_in_two_shards_is_rl_in_one_process_and_its_checkpoint_draws(folder, tmp_path, monkeypatch):
    from tests.command.test_cli import run as shell

    small = [item for item in SMALL if item != "trainer=cpu"]
    common = [
        "method=irg_grpo",
        "method.group_size=2",
        "data.batch_size=2",
        "data.prompts_per_task=1",
        "trainer.max_steps=2",
        "evaluation.stages=[]",
        "~callbacks.sample_grid",
        "method.interleave.max_tokens=12",
        "method.tokens_per_pass=700",
        f"path={folder}",
        "+method.optimizer.eps=1e-4",
        *small,
    ]
    for name in ("cpu", "fsdp_sim"):
        done = shell(*common, f"trainer={name}", f"hydra.run.dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    saved = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("cpu", "fsdp_sim")
    ]
    for name, value in saved[0].items():
        assert (value - saved[1][name]).abs().max() < 1e-5, name
    checkpoint = tmp_path / "cpu" / "checkpoints" / "last.ckpt"
    run(
        monkeypatch,
        tmp_path,
        folder,
        "task=generate",
        "method=irg_grpo",
        f"ckpt_path={checkpoint}",
        "prompt=a red circle",
        "num_images=1",
        "hydra.run.dir=drawn",
    )
    assert (tmp_path / "drawn" / "trajectories" / "00000" / "strip.png").is_file()


@pytest.mark.slow
def test_the_papers_configs_run_small_from_the_published_format(folder, tmp_path, monkeypatch):
    """With only paths, sizes and counts changed: data of the toy layout, stage 1, then stage 2 from its mean."""
    small = [
        f"model.path={folder}",
        "model.device=null",
        "trainer=cpu",
        "trainer.precision=32-true",
        "data.batch_size=4",
        "model.max_plan_tokens=8",
        "~callbacks.progress",
        "method.interleave.max_tokens=6",
        "method.interleave.retries=0",
        "trainer.max_steps=1",
        "data.path=irgl",
    ]
    made = [
        "task=make_irgl",
        "model=janus",
        f"path={folder}",
        "model.max_plan_tokens=8",
        "task.out=irgl",
        "task.count=6",
        "task.shard_size=4",
        "trainer=cpu",
    ]
    assert call(monkeypatch, tmp_path, *made) == 0
    assert call(monkeypatch, tmp_path, "experiment=irg_janus_pro_7b", *small, "hydra.run.dir=one") == 0
    assert len(list((tmp_path / "one" / "samples").glob("*.png"))) == 2
    start = f"method.start_from={tmp_path / 'one' / 'checkpoints' / 'last.ckpt'}"
    assert call(monkeypatch, tmp_path, "experiment=irg_janus_pro_7b_stage2", *small, start, "hydra.run.dir=two") == 0
    saved = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 2e-5 and saved["global_step"] == 1


def test_the_papers_numbers_are_in_its_configs():
    from omegaconf import OmegaConf

    from tests.support.commands import composed

    one = composed("experiment=irg_janus_pro_7b", "data.path=irgl")
    two = composed("experiment=irg_janus_pro_7b_stage2", "data.path=irgl", "method.start_from=last.ckpt")
    paper = {
        "method.optimizer.lr": 2e-5,
        "method.optimizer.eps": 1e-15,
        "method.optimizer.betas": [0.9, 0.95],
        "method.optimizer.weight_decay": 0.0,
        "method.ema": 0.995,
        "method.max_grad_norm": 1.0,
        "method.text_loss_weight": 1.0,
        "method.image_loss_weight": 1.0,
        "method.interleave.reflection_scale": 2.0,
        "method.interleave.image_scale": 2.0,
        "method.interleave.prompt_scale": 1.0,
        "method.interleave.text_temperature": 0.3,
        "method.interleave.rounds": 2,
    }
    for cfg, steps, warmup, stage in ((one, 2000, 500, 1), (two, 30000, None, 2)):
        for key, value in {
            **paper,
            "trainer.max_steps": steps,
            "data.stage": stage,
            "method.scheduler.total_iters": warmup,
        }.items():
            assert OmegaConf.select(cfg, key) == value, key
