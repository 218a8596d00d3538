"""The papers' configs hold the papers' numbers, and everything but the weights comes up.

Whole runs, small, then go through the same configs.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from t2i_rl.command.settings import check_settings
from t2i_rl.core import loading
from t2i_rl.data.make_prompts import make_prompts
from t2i_rl.tasks.examine import check_method
from tests.support.commands import composed
from tests.support.small_rewards import save_small_gdino, save_small_git, save_small_hps_open_clip, save_small_orm
from tests.support.tiny import save_tiny_janus

ROOT = Path(__file__).parents[2]
ABLATIONS = ("iris_image_only", "iris_text_only", "iris_max_sc", "iris_entropy", "iris_no_plan")
PAPERS = ("iris_janus_pro_1b", "iris_janus_pro_7b", "t2i_r1_janus_pro_7b", *ABLATIONS)
IRIS = {
    "method.group_size": 8,
    "data.batch_size": 8,
    "trainer.max_steps": 800,
    "method.optimizer.lr": 1e-6,
    "method.kl_coef": 0.01,
    "model.guidance_scale": 5.0,
    "model.temperature": 1.0,
    "method.updates_per_rollout": 1,
    "method.loss_reduction": "sequence",
    "method.max_grad_norm": 1.0,
    "method.logprob": "conditional",
    "method.lora": None,
    "model.dtype": "float32",
    "trainer.precision": "bf16-mixed",
    "reward._target_": "t2i_rl.rewards.self_certainty.SelfCertainty",
    "reward.image_sign": -1,
}
DIFFERENT = {
    "iris_janus_pro_1b": {
        "model.path": "deepseek-community/Janus-Pro-1B",
        "reward.text_sign": -1,
        "method.plan": True,
    },
    "iris_janus_pro_7b": {
        "model.path": "deepseek-community/Janus-Pro-7B",
        "trainer.strategy._target_": "t2i_rl.core.fsdp.FSDP2",
    },
    "t2i_r1_janus_pro_7b": {
        "data.batch_size": 16,
        "trainer.max_steps": 1600,
        "method.loss_reduction": "prompt",
        "reward.image_sign": None,
        "reward._target_": "t2i_rl.rewards.weighted_sum.WeightedSum",
        "reward.weights": {"hpsv2": 1.0, "gdino": 1.0, "git_vqa": 1.0, "orm": 1.0},
        "reward.parts.gdino.box_threshold": 0.3,
        "reward.parts.gdino.compat": "released",
        "reward.parts.orm.compat": "released",
        "reward.parts.orm.yes_word": "yes",
        "model.chat.final_stop": "keep",
        "method.scheduler.total_iters": 1600,
        "callbacks.checkpoint.keep_every_n_steps": 400,
    },
    "iris_image_only": {
        "reward.text_sign": 0,
        "method.text_loss_weight": 0.0,
        "method.plan": True,
    },
    "iris_text_only": {
        "reward.image_sign": 0,
        "method.image_loss_weight": 0.0,
    },
    "iris_max_sc": {
        "reward.text_sign": 1,
        "reward.image_sign": 1,
    },
    "iris_entropy": {
        "reward.divergence": "backward",
    },
    "iris_no_plan": {
        "method.plan": False,
        "reward.text_sign": 0,
    },
}


def annotated(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    rows = make_prompts(dict.fromkeys(["two_object", "counting", "position", "color_attr"], 4), seed=0)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", PAPERS)
def test_the_numbers_are_the_papers_and_all_but_the_weights_comes_up(name, tmp_path, monkeypatch):
    settings = [
        f"experiment={name}",
        f"data.path={annotated(tmp_path)}",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
    ]
    if name.startswith("t2i_r1"):
        settings.append("reward.parts.orm.path=orm")
    cfg = composed(*settings)
    for key, value in {**IRIS, **DIFFERENT[name]}.items():
        assert OmegaConf.select(cfg, key) == value, key
    cfg.paths.output_dir = str(tmp_path)
    check_settings(cfg, ("method", "model", "reward", "data"))
    monkeypatch.setattr(loading, "load_model", lambda *args, **kw: None)
    sizes = SimpleNamespace(vocab_size=1, max_position_embeddings=1)
    config, model = SimpleNamespace(text_config=sizes, **vars(sizes)), torch.nn.Identity()
    model.config = config
    for module in ("gdino", "git_vqa", "orm", "clip_score"):
        monkeypatch.setattr(f"t2i_rl.rewards.{module}.load_part", lambda *args, **kw: None)
        monkeypatch.setattr(f"t2i_rl.rewards.{module}.load_config", lambda *args: config)
        if module == "clip_score":
            monkeypatch.setattr("t2i_rl.rewards.clip_score.load_open_clip", lambda *args, **kw: model)
        else:
            monkeypatch.setattr(f"t2i_rl.rewards.{module}.load_model", lambda *args, **kw: None)
    for module in ("git_vqa", "orm"):
        monkeypatch.setattr(f"t2i_rl.rewards.{module}.single_token", lambda *args: 0)
    monkeypatch.setattr("t2i_rl.rewards.clip_score.load_part", lambda *args, **kw: type("T", (), {"eos_token_id": 1}))
    for name in ("gdino", "git_vqa"):
        monkeypatch.setattr(f"t2i_rl.rewards.{name}.load_tokenizer", lambda *args, **kw: None)
    for name in ("check_tokenizer", "special_texts"):
        monkeypatch.setattr(f"t2i_rl.rewards.orm.{name}", lambda *args, **kw: None)
    monkeypatch.setattr("t2i_rl.rewards.clip_score.ClipScore._check_tokenizer", lambda *args: None)
    reward, data = instantiate(cfg.reward), instantiate(cfg.data)
    assert callable(reward) and len(data.prompts) == 16
    check_method(cfg, training=True)
    trainer = instantiate(cfg.trainer, callbacks=list(instantiate(cfg.callbacks).values()), logger=False)
    assert isinstance(trainer, L.Trainer) and trainer.max_steps == cfg.trainer.max_steps
    instantiate(cfg.model.rollout)


RELEASED = {  # github.com/yhangchen/IRIS at 9778e58
    "reward.aggregation": "token_mean",
    "reward.constant": "kept",
    "method.loss_reduction": "prompt",
    "method.image_loss_weight": 1.0,
    "method.scheduler.total_iters": 1600,
    "trainer.max_steps": 800,
    "model.chat.final_stop": "keep",
    "method.optimizer.lr": 1e-6,
}


@pytest.mark.parametrize("name", ["iris_janus_pro_1b", "iris_janus_pro_7b"])
def test_iris_as_released_is_one_word_and_ours_differs_in_every_number_it_changes(name):
    released = composed(f"experiment={name}", "data.path=x", "variant=released")
    ours = composed(f"experiment={name}", "data.path=x", "variant=ours")
    changed = {key for key, value in RELEASED.items() if OmegaConf.select(ours, key) != value}
    for key, value in RELEASED.items():
        assert OmegaConf.select(released, key) == value, key
    assert changed == {
        "reward.aggregation",
        "reward.constant",
        "method.loss_reduction",
        "method.scheduler.total_iters",
        "model.chat.final_stop",
    }
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = instantiate(released.method.optimizer)([weight])
    scheduler = instantiate(released.method.scheduler)(optimizer)
    for _ in range(800):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.5e-6)


def run(folder: Path, *arguments: str) -> list[dict]:
    """Two steps on a CPU; only paths and sizes differ from the full-size run."""
    sizes = [
        f"hydra.run.dir={folder}",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.strategy=auto",
        "trainer.max_steps=2",
        "data.batch_size=2",
        "method.group_size=2",
        "model.max_plan_tokens=12",
        "method.scheduler.total_iters=1000",
        "method.optimizer.lr=1e-4",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "run.py", *arguments, *sizes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def test_a_whole_iris_run(tmp_path, checkpoint):
    rows = run(
        tmp_path / "run",
        "experiment=iris_janus_pro_1b",
        f"model.path={checkpoint}",
        f"data.path={annotated(tmp_path)}",
    )
    assert len(rows) == 2 and all(float(row["train/grad_norm"]) > 0 for row in rows)
    assert abs(float(rows[0]["train/kl"])) < 1e-6 < float(rows[1]["train/kl"])
    assert float(rows[0]["reward/total"]) < 0 and (tmp_path / "run" / "report.html").exists()
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) >= 1


def test_a_whole_t2i_r1_run(tmp_path, checkpoint):
    savers = {
        "hpsv2": save_small_hps_open_clip,
        "gdino": save_small_gdino,
        "git_vqa": save_small_git,
        "orm": save_small_orm,
    }
    paths = [f"reward.parts.{name}.path={save(tmp_path / name)}" for name, save in savers.items()]
    rows = run(
        tmp_path / "run",
        "experiment=t2i_r1_janus_pro_7b",
        f"model.path={checkpoint}",
        f"data.path={annotated(tmp_path)}",
        *paths,
        f"reward.parts.hpsv2.processor={tmp_path / 'hpsv2'}",
        "reward.parts.hpsv2.text_heads=4",
        "reward.parts.hpsv2.vision_heads=2",
    )
    for row in rows:
        parts = [float(row[f"reward/{name}"]) for name in savers]
        assert float(row["reward/total"]) == pytest.approx(sum(parts), abs=1e-5)
        assert float(row["train/grad_norm"]) > 0 and float(row["time/reward"]) > 0
