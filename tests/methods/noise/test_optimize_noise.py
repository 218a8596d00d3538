"""Noise optimisation by its commands: the embedded world, two ranks, a kill, the published presets on small pipelines
of the real classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from t2i_rl.command.settings import check_settings
from t2i_rl.tasks.examine import check_method
from tests.rewards.test_pixel_rewards import head
from tests.support.commands import call, composed
from tests.support.small_diffusers import pipeline
from tests.support.small_rewards import save_small_hps

ROOT = Path(__file__).parents[3]
QUICK = [
    "method=noise_opt",
    "data.prompts_per_task=1",
    "method.iterations=4",
    "method.image_every=2",
    "method.measure_every=2",
]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "run.py", *arguments, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noise") / "run"
    run(folder, *QUICK, "method.samples=2")
    return folder


def test_a_run_leaves_results_tables_strips_and_a_page(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results["stages"]) == {"initial", "best", "last"} and results["steps"] == 4
    change = results["comparisons"][0]["metrics"]
    assert change["target"]["difference"] > 0 and change["target"]["n_images"] == 12
    assert {"overall", "watch/oracle/strict", "health/std", "inside/spectrum", "diversity"} <= set(
        results["stages"]["best"]["metrics"]
    )
    assert results["headline"]["metric"] == "overall" and results["weights_sha256"]["reward"]["recognizer"]
    page = (finished / "report.html").read_text()
    assert "Is the noise still Gaussian?" in page and "Target and held-out judges" in page
    assert len(list((finished / "strips").glob("*.png"))) == 6 and (finished / "curves.png").exists()
    assert "noise/target" in (finished / "metrics.csv").read_text().splitlines()[0]


def test_the_noise_on_disk_draws_the_picture_on_disk(finished):
    """initial, best and last are unpacked, float32, and what the model drew from."""
    noises = load_file(finished / "noise" / "00000" / "noise.safetensors")
    assert noises["initial"].shape == (8, 8, 8) and noises["initial"].dtype == torch.float32
    assert torch.equal(noises["initial"], noises["step_0000"]) and not torch.equal(noises["initial"], noises["last"])


def test_a_killed_run_does_the_rest_and_no_more(finished, tmp_path):
    kept = {
        place: place.stat().st_mtime_ns
        for place in (finished / "noise").glob("*/case.json")
        if place.parent.name != "00003"
    }
    whole = json.loads((finished / "results.json").read_text())["stages"]
    (finished / "noise" / "00003" / "case.json").unlink()
    done = run(finished, *QUICK, "method.samples=2")
    assert "11 of 12 done before" in done.stdout and "at the first noise, " in done.stdout
    changed = [place.parent.name for place, time in kept.items() if place.stat().st_mtime_ns != time]
    assert changed == [] and (finished / "noise" / "00003" / "case.json").exists()
    again = json.loads((finished / "results.json").read_text())["stages"]
    assert again["last"]["metrics"]["target"]["mean"] == pytest.approx(
        whole["last"]["metrics"]["target"]["mean"], rel=1e-3
    )


def test_sigterm_ends_a_search_at_once_and_says_how_to_go_on(tmp_path):
    settings = [*QUICK, "method.iterations=300", "method.batch_size=1", f"hydra.run.dir={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    going = subprocess.Popen(
        [sys.executable, "run.py", *settings], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    for line in going.stdout:
        if line.startswith("1 of 6 cases"):
            break
    going.terminate()
    said, _ = going.communicate(timeout=60)
    assert (
        going.returncode == 143 and f"1 of 6 cases are finished; the same command with hydra.run.dir={tmp_path}" in said
    )
    assert [place.parent.name for place in (tmp_path / "noise").glob("*/case.json")] == ["00000"]


def test_other_settings_do_not_overwrite_finished_cases(finished, monkeypatch, capsys):
    before = {file: file.read_bytes() for file in (finished / "noise").rglob("*.json")}
    assert (
        call(monkeypatch, finished.parent, f"hydra.run.dir={finished}", *QUICK, "method.samples=2", "method.balance=2")
        == 2
    )
    assert "12 cases finished under other settings (method.balance=1.0 there and 2 here)" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in (finished / "noise").rglob("*.json")}


def test_what_changes_no_result_may_change(finished):
    done = run(finished, *QUICK, "method.samples=2", "method.batch_size=3", "method.image_every=1")
    assert "12 of 12 done before" in done.stdout


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(finished, tmp_path):
    run(tmp_path / "two", *QUICK, "method.samples=2", "trainer=ddp_sim")
    one, two = (json.loads((folder / "results.json").read_text())["stages"] for folder in (finished, tmp_path / "two"))
    for end in ("initial", "best", "last"):
        for name in ("target", "overall", "health/std"):
            assert two[end]["metrics"][name]["mean"] == pytest.approx(
                one[end]["metrics"][name]["mean"], rel=1e-3, abs=1e-3
            )


def test_search_without_gradients_takes_the_exact_judge(tmp_path, monkeypatch):
    assert (
        call(
            monkeypatch,
            tmp_path,
            "hydra.run.dir=.",
            "method=noise_search",
            "reward=oracle",
            "debug=fdr",
            "~watch.oracle",
        )
        == 0
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["stages"]) == {"initial", "best"} and results["benchmark"]["n_prompts"] == 6
    means = [results["stages"][end]["metrics"]["target"]["mean"] for end in ("initial", "best")]
    assert results["reward"] == "oracle" and means[1] >= means[0]


def test_latents_on_the_command_line(finished, tmp_path, monkeypatch, capsys):
    def figures(file: Path, *options: str) -> dict:
        assert call(monkeypatch, tmp_path, "hydra.run.dir=.", "task=gaussianity", f"latents={file}", *options) == 0
        assert "true noise" in capsys.readouterr().out
        return json.loads((tmp_path / "gaussianity.json").read_text())

    found = figures(finished / "noise" / "00000" / "noise.safetensors")
    assert set(found["initial"]) == {"mean", "std", "kurtosis", "ks", "lag1_x", "lag1_y", "max_power", "spectrum"}
    noise = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = noise.unflatten(2, (8, 2)).unflatten(4, (8, 2)).permute(0, 2, 4, 1, 3, 5).reshape(2, 64, 64)
    save_file({"a": packed.contiguous()}, tmp_path / "packed.safetensors")
    save_file({"a": noise}, tmp_path / "plain.safetensors")
    assert figures(tmp_path / "packed.safetensors", "task.packed=true") == figures(tmp_path / "plain.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "holds no tensors"),
        ({"a": torch.zeros(0, 4, 4)}, "a latent is (C, h, w)"),
        ({"a": torch.ones(2, 4, 4)}, "all the same"),
        ({"fine": torch.eye(4)[None], "no": torch.ones(3)}, "no has shape (3,)"),
    ],
)
def test_what_is_no_latent_is_refused_before_anything_is_printed(tensors, said, tmp_path, monkeypatch, capsys):
    save_file(tensors, tmp_path / "a.safetensors")
    assert call(monkeypatch, tmp_path, "task=gaussianity", f"latents={tmp_path / 'a.safetensors'}") == 2
    printed = capsys.readouterr()
    assert said in printed.err and "true noise" not in printed.out


@pytest.mark.parametrize(
    "options",
    [
        "method.optimizer.lr=nan",
        "method.max_grad_norm=nan",
        "method.min_rise=-5",
        "method.optimizer.momentum=2",
        "data.prompts_per_task=-1",
    ],
)
def test_options_out_of_range_are_named(options, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, *QUICK, options) == 2
    assert options.partition("=")[0].rpartition(".")[2] in capsys.readouterr().err


def test_a_search_that_draws_from_a_gaussian_takes_no_regularizer(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, "method=noise_search", "regularizer=mpgr") == 2
    assert "leave it out" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path, "method=noise_search", "method.iterations=3") == 2
    assert "method has algorithm, evaluations" in capsys.readouterr().err


PUBLISHED = {
    "mpgr_flux_aesthetic": {
        "method.iterations": 500,
        "method.max_grad_norm": 0.01,
        "method.optimizer.momentum": 0.9,
        "method.optimizer.nesterov": True,
        "regularizer.terms.spectrum.weight": 25.0,
        "regularizer.terms.spectrum.group": 16,
        "regularizer.terms.spectrum.mu": 0.875,
        "model.size": 512,
        "model.steps": 1,
    },
    "mpgr_flux_pickscore": {"method.iterations": 500, "method.balance": 1.0, "reward.scaled": True},
    "gper_flux": {
        "method.iterations": 200,
        "method.max_grad_norm": 0.03,
        "method.optimizer.lr": 0.02,
        "method.optimizer._target_": "torch.optim.Adam",
    },
    "reno_sdxl_turbo": {
        "method.iterations": 50,
        "method.max_grad_norm": 0.1,
        "method.optimizer.lr": 5.0,
        "method.balance": None,
        "regularizer.terms.norm.weight": 0.01,
        "reward.weights": {"hpsv2": 5.0, "image_reward": 1.0, "clip": 0.01, "pickscore": 0.05},
    },
    "dno_sd15": {
        "method.iterations": 100,
        "method.eta": 1.0,
        "method.last_step_noise": False,
        "model.steps": 50,
        "model.guidance_scale": 5.0,
        "method.optimizer.lr": 0.01,
        "regularizer.terms.prno.k": 4,
        "regularizer.terms.prno.shuffles": 100,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name):
    cfg = composed(f"experiment={name}", "data.path=prompts.txt", "trainer.accelerator=cpu")
    for key, value in PUBLISHED[name].items():
        assert OmegaConf.select(cfg, key) == value, key
    check_settings(cfg, ("method", "model", "data"))
    check_method(cfg, training=True)


SMALL = {
    "flux_schnell": ("flux", ["model.size=32", "model.max_sequence_length=8"]),
    "sd_turbo": ("sd_turbo", ["model.size=32"]),
    "sdxl_turbo": ("sdxl_turbo", ["model.size=32", "model.vae=null"]),
    "sd35_large_turbo": ("sd35", ["model.size=32", "model.max_sequence_length=8"]),
    "sana_sprint": ("sana", ["model.size=32", "model.max_sequence_length=8"]),
    "sd15": (
        "sd15",
        ["model.size=32", "model.steps=2", "method.eta=1", "regularizer=prno", "regularizer.terms.prno.shuffles=2"],
    ),
}


@pytest.mark.parametrize("model", SMALL)
def test_a_whole_run_on_a_small_pipeline_of_the_real_class(model, tmp_path, monkeypatch, capsys):
    kind, settings = SMALL[model]
    folder, clip = pipeline(kind, tmp_path / "model"), save_small_hps(tmp_path / "clip")
    torch.save(head(), tmp_path / "head.pth")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n")
    code = call(
        monkeypatch,
        tmp_path,
        "hydra.run.dir=run",
        "method=noise_opt",
        f"model={model}",
        f"model.path={folder}",
        "data=prompts",
        f"data.path={tmp_path / 'prompts.txt'}",
        "reward=aesthetic",
        f"reward.path={clip}",
        f"reward.head={tmp_path / 'head.pth'}",
        "~watch.oracle",
        "method.iterations=3",
        "trainer.accelerator=cpu",
        "method.gradient_checkpointing=true",
        "method.free_text_encoders=true",
        "model.device=cpu",
        *settings,
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err[-3000:]
    assert "memory predicted: weights" in printed.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["headline"]["metric"] == "target" and results["headline"]["difference"] > 0
    assert results["sampling"]["dtype"] == "bfloat16" and (tmp_path / "run" / "report.html").exists()
