"""The configs of SoftREPA and AGSM hold the published settings.

Whole runs of them work on small pipelines of the real classes, with only paths and sizes changed.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from omegaconf import OmegaConf

from t2i_rl.command.settings import check_settings
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, load_soft_tokens
from t2i_rl.tasks.examine import check_method
from tests.data.test_image_text import make
from tests.support.commands import composed
from tests.support.small_diffusers import pipeline
from tests.support.small_rewards import save_small_hps_open_clip

ROOT = Path(__file__).parents[2]
SHARED = {
    "variant": "released",
    "data.size": 512,
    "data.split": "train2017",
    "method.optimizer.lr": 1e-3,
    "method.optimizer.weight_decay": 1e-4,
    "method.scheduler.T_0": 10,
    "method.scheduler.eta_min": 1e-5,
    "method.max_grad_norm": None,
    "callbacks.validation.best": "val/clip",
}
DRAWN = {
    "sd15": {
        "model.steps": 30,
        "model.guidance_scale": 7.0,
        "model.size": 512,
    },
    "sdxl": {
        "model.steps": 30,
        "model.guidance_scale": 7.0,
        "model.size": 1024,
        "model.size_ids": [512, 512, 0, 0, 512, 512],
    },
    "sd3": {
        "model.steps": 28,
        "model.guidance_scale": 4.0,
        "model.size": 1024,
        "model.max_sequence_length": 512,
    },
}
# Batch size, optimizer steps in all, and optimizer steps to one step of the learning rate schedule.
TRAINED = {
    ("softrepa", "sd15"): (8, 41500, 500),
    ("softrepa", "sdxl"): (8, 2500, 500),
    ("softrepa", "sd3"): (4, 6000, 500),
    ("agsm", "sd15"): (4, 100000, 1000),
    ("agsm", "sdxl"): (4, 1000, 100),
    ("agsm", "sd3"): (4, 100000, 1000),
}
STOCK = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline}


@pytest.mark.parametrize(("method", "model"), TRAINED)
def test_the_numbers_are_the_published_ones(method, model):
    cfg = composed(f"experiment={method}_{model}", "data.path=coco", "trainer.accelerator=cpu")
    batch, steps, every = TRAINED[method, model]
    chosen = {"data.batch_size": batch, "trainer.max_steps": steps, "method.schedule_every": every}
    for key, value in {**SHARED, **DRAWN[model], **chosen}.items():
        assert OmegaConf.select(cfg, key) == value, key
    check_settings(cfg, ("method", "model", "data"))
    check_method(cfg, training=True)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "run.py", *arguments, f"hydra.run.dir={folder}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("method", "model"),
    [
        pytest.param("softrepa", "sd15", marks=pytest.mark.slow),
        pytest.param("softrepa", "sdxl", marks=pytest.mark.slow),
        ("agsm", "sd3"),
    ],
)
def test_a_whole_run_on_a_small_pipeline_of_the_same_classes(method, model, tmp_path):
    folder = pipeline(model, tmp_path / model)
    coco = make("coco", tmp_path / "coco")
    clip = save_small_hps_open_clip(tmp_path / "clip")
    small = [
        f"experiment={method}_{model}",
        f"model.path={folder}",
        f"data.path={coco}",
        "data.size=32",
        "model.size=32",
        "data.batch_size=2",
        "data.held_out=2",
        "model.steps=2",
        "trainer.accelerator=cpu",
        f"callbacks.validation.judges.clip.path={clip}",
        "callbacks.validation.every_n_steps=1",
    ]
    small += ["model.vae=null"] if model == "sdxl" else ["model.max_sequence_length=4"] if model == "sd3" else []
    encoded = run(tmp_path / "encode", *small, "task=encode", f"task.out={tmp_path / 'encodings'}")
    assert encoded.returncode == 0, encoded.stderr[-3000:]
    done = run(tmp_path / "run", *small, "trainer.max_steps=2", f"data.encodings={tmp_path / 'encodings'}")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    trained = [row for row in rows if row["train/loss"]]
    assert len(trained) == 2 and all(float(row["train/loss"]) > 0 for row in trained)
    assert len([row for row in rows if row["val/clip"]]) == 2 and any(row["val_base/clip"] for row in rows)
    assert (tmp_path / "run" / "report.html").exists() and list((tmp_path / "run" / "samples").glob("*.png"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["method"] == method and results["reward"] == "none" and results["steps"] == 2
    absent = {"text_encoder_3": None, "tokenizer_3": None} if model == "sd3" else {}
    pipe = STOCK[model].from_pretrained(folder, **absent)
    handle = load_soft_tokens(pipe, tmp_path / "run" / "soft_tokens.safetensors")
    assert handle.bank.spec.branches == (2 if method == "agsm" else 1)
    assert SoftTokens.load(tmp_path / "run" / "soft_tokens.safetensors").facts["model"] == str(folder)
