"""Diffusion-DPO against the written loss, its data, and the export of what it has learnt as a stock pipeline."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.data.preferences import Preferences, PreferenceStream
from t2i_rl.methods.pairs.diffusion_dpo import DiffusionDPO
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion
from t2i_rl.tasks import export, make_preferences
from tests.support.small_diffusers import pipeline

ROOT = Path(__file__).parents[3]
LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(pipeline("sd15", tmp_path_factory.mktemp("sd15") / "p"))


@pytest.fixture
def preferences(tmp_path):
    (tmp_path / "pairs").mkdir()
    rows = []
    for number in range(4):
        for name in ("good", "bad"):
            picture = np.full((32, 32, 3), 40 * number + 20 * (name == "bad"), np.uint8)
            Image.fromarray(picture).save(tmp_path / "pairs" / f"{name}{number}.png")
        rows.append({"prompt": f"{number} circles", "preferred": f"good{number}.png", "other": f"bad{number}.png"})
    (tmp_path / "pairs" / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs"


def moved(folder, **options) -> DiffusionDPO:
    """A method whose adapters have left their start, so that the model differs from its reference."""
    method = DiffusionDPO(
        StableDiffusion(folder), partial(torch.optim.SGD, lr=1.0), LORA, **{"max_grad_norm": None, **options}
    )
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return method


@pytest.mark.parametrize("passes", [1, 3, 16])
def test_a_step_is_the_gradient_of_the_written_loss(folder, preferences, passes):
    method = moved(folder, beta=60.0, pairs_per_pass=passes)
    method.manual_backward = lambda loss: loss.backward()
    batch = next(iter(PreferenceStream(preferences, Preferences(str(preferences), 3).rows, 3, 0, 0)))
    grid = method.grid(batch)
    assert torch.equal(grid.t[:3], grid.t[3:])
    with method.untouched(), torch.no_grad():
        reference = [_error(method, grid, row) for row in range(6)]
    loss = 0.0
    for row in range(3):
        gap = (_error(method, grid, row) - reference[row]) - (_error(method, grid, row + 3) - reference[row + 3])
        loss = loss - torch.log(1 / (1 + torch.exp(30.0 * gap))) / 3
    learning = [parameter for parameter in method.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss, learning)
    metrics = method.accumulate(grid, None)
    for parameter, gradient in zip(learning, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_beta_counts_as_in_the_released_code(folder, preferences):
    """The loss of planted errors in float64, at the released scripts' 5000: half of beta times the difference of the
    differences."""
    method = moved(folder, beta=5000.0)
    method.manual_backward = lambda loss: None
    grid = method.grid(next(iter(PreferenceStream(preferences, Preferences(str(preferences), 2).rows, 2, 0, 0))))
    with torch.no_grad():
        tuned = np.array([float(_error(method, grid, row)) for row in range(4)], dtype=np.float64)
        with method.untouched():
            reference = np.array([float(_error(method, grid, row)) for row in range(4)], dtype=np.float64)
    grown = tuned - reference
    expected = np.mean(np.logaddexp(0, 0.5 * 5000 * (grown[:2] - grown[2:])))
    assert method.accumulate(grid, None)["train/loss"] == pytest.approx(expected, rel=1e-3)


def _error(method, grid, row: int) -> torch.Tensor:
    said = method.model.predict(grid.x_t[row : row + 1], grid.t[row : row + 1], grid.text[row : row + 1])
    return ((said - grid.target[row : row + 1]) ** 2).mean()


def test_the_loss_starts_at_ln_2_and_both_pictures_of_a_pair_share_their_draws(folder, preferences):
    method = DiffusionDPO(StableDiffusion(folder), partial(torch.optim.SGD, lr=1.0), LORA)
    method.manual_backward = lambda loss: loss.backward()
    batch = next(iter(PreferenceStream(preferences, Preferences(str(preferences), 2).rows, 2, 0, 0)))
    seen = {}
    method.model.add_noise = lambda x0, eps, t: seen.update(eps=eps) or x0
    metrics = method.accumulate(method.grid(batch), None)
    assert metrics["train/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert torch.equal(seen["eps"][:2], seen["eps"][2:]) and not torch.equal(seen["eps"][0], seen["eps"][1])
    with pytest.raises(UserError, match="beta"):
        moved(folder, beta=0.0)


def test_the_stream_goes_through_all_pairs_and_on(preferences):
    data = Preferences(str(preferences), 2)
    batches = [next(iter(PreferenceStream(preferences, data.rows, 2, 0, k))) for k in range(4)]
    for epoch in (0, 2):
        assert sorted(batches[epoch].captions + batches[epoch + 1].captions) == sorted(
            row["prompt"] for row in data.rows
        )
    stream = iter(PreferenceStream(preferences, data.rows, 2, 0, 0))
    assert [next(stream).captions for _ in range(4)] == [batch.captions for batch in batches]
    good, bad = batches[0].pixels[0], batches[0].pixels[2]
    assert float(bad.mean() - good.mean()) == pytest.approx(20 / 127.5, abs=1e-4)
    for wrong in ({"path": "nowhere"}, {"path": str(preferences), "batch_size": 9}):
        with pytest.raises(UserError):
            Preferences(**wrong)


def test_what_was_learnt_is_exported_as_a_stock_pipeline(folder, tmp_path, monkeypatch):
    trained = moved(folder).model
    drawn = trained.sample(["a red circle"], [3], num_inference_steps=2)
    monkeypatch.setattr(export, "instantiate", lambda node: trained)
    cfg = OmegaConf.create(
        {
            "task": {"out": str(tmp_path / "out"), "adapter": False},
            "ckpt_path": None,
            "model": {},
            "method": {"_target_": "t2i_rl.methods.pairs.diffusion_dpo.DiffusionDPO", "lora": {"r": 2}},
            "paths": {},
        }
    )
    export.run(cfg)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.cross_attention_dim == 16
    again = StableDiffusion(str(tmp_path / "out")).sample(["a red circle"], [3], num_inference_steps=2)
    assert np.abs(again.astype(int) - drawn).max() <= 1
    base = StableDiffusion(folder).sample(["a red circle"], [3], num_inference_steps=2)
    assert np.abs(base.astype(int) - drawn).max() > 1


def test_preferences_are_made_of_right_and_wrong_pictures(folder, tmp_path):
    cfg = OmegaConf.create(
        {
            "model": {
                "_target_": "t2i_rl.models.diffusion.stable_diffusion.StableDiffusion",
                "path": folder,
                "steps": 1,
            },
            "task": {"out": str(tmp_path / "made"), "prompts_per_task": 2, "samples": 2},
            "evaluation": {"batch_size": 5},
            "seed": 0,
            "trainer": {"accelerator": "cpu"},
        }
    )
    made = make_preferences.run(cfg)
    rows = [json.loads(line) for line in (tmp_path / "made/preferences.jsonl").read_text().splitlines()]
    assert made["preferences"] == len(rows)
    assert all(row["scores"][0] > row["scores"][1] and (tmp_path / "made" / row["other"]).is_file() for row in rows)
    with pytest.raises(UserError, match="already"):
        make_preferences.check(cfg)


@pytest.mark.slow
def test_from_preferences_to_a_tuned_pipeline_on_the_command_line(tmp_path):
    small = ["model=sd_tiny", "model.steps=4"]
    tuned = [
        *small,
        "method=diffusion_dpo",
        f"data.path={tmp_path / 'made'}",
        "data.batch_size=2",
        "trainer.max_steps=2",
        "evaluation.stages=[]",
        "callbacks.validation.every_n_steps=1",
        "callbacks.validation.benchmark.prompts_per_task=1",
        "~callbacks.progress",
    ]
    jobs = {
        "preferences": [*small, "task=make_preferences", f"task.out={tmp_path / 'made'}", "task.prompts_per_task=3"],
        "run": tuned,
        "export": [
            *tuned,
            "task=export",
            f"ckpt_path={tmp_path / 'run/checkpoints/best.ckpt'}",
            f"task.out={tmp_path / 'out'}",
        ],
    }
    for name, arguments in jobs.items():
        command = [sys.executable, "run.py", *arguments, f"hydra.run.dir={tmp_path / name}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2
    assert len(StableDiffusion(str(tmp_path / "out"), steps=1).sample(["a red circle"], [0])) == 1
