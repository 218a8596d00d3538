"""Noise optimisation and its rivals on a small FLUX: per-case independence, balance, clip, stops, resume, files."""

import json
import math
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch

from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.gaussianity.constraints import Renorm, WhitenedNoise
from t2i_rl.gaussianity.moments import KL, Moment
from t2i_rl.gaussianity.regularizer import Regularizer
from t2i_rl.gaussianity.spectrum import Spectrum
from t2i_rl.methods.noise.climb import NoiseOptimization
from t2i_rl.methods.noise.langevin import Langevin
from t2i_rl.methods.noise.search import NoiseSearch
from t2i_rl.models.diffusion.flux import Flux
from tests.support.small_diffusers import pipeline

PROMPTS = [
    Prompt(f"p{i}", text, "single_object", {})
    for i, text in enumerate(["a red circle", "two blue squares", "a green cross"])
]
MPGR = {"1": Moment(1), "2": Moment(2), "s": Spectrum(bins="full", permutation="fresh", weight=25.0)}
SGD = partial(torch.optim.SGD, lr=5.0, momentum=0.9, nesterov=True)


class Redness(Reward):
    """How red a picture is: differentiable, and its own held-out judge when asked as one."""

    differentiable = True

    def score_pixels(self, pixels, prompts):
        return pixels[:, 0].mean(dim=(1, 2)) - pixels[:, 1:].mean(dim=(1, 2, 3))

    def __call__(self, pictures):
        pixels = torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float() / 255
        return RewardOutput(self.score_pixels(pixels, None).double())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Flux(str(pipeline("flux", tmp_path_factory.mktemp("flux"))), size=32, max_sequence_length=16)


def optimization(model, folder, **settings) -> NoiseOptimization:
    chosen = {
        "regularizer": Regularizer(MPGR),
        "optimizer": SGD,
        "iterations": 8,
        "watch": {"red": Redness()},
    } | settings
    return given(
        NoiseOptimization(model, chosen.pop("reward", Redness()), chosen.pop("watch"), folder=folder, **chosen)
    )


def given(method, settings: str = ""):
    method.prompts, method.settings = PROMPTS, settings
    return method


def run(method) -> list[dict]:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        enable_checkpointing=False,
    )
    trainer.predict(method)
    return method.finished()


def trajectory(method, case: dict) -> list[dict]:
    return [json.loads(line) for line in (method.folder / case["place"] / "trajectory.jsonl").read_text().splitlines()]


def test_the_target_rises_and_everything_is_written(model, tmp_path):
    method = optimization(model, tmp_path, image_every=4, measure_every=2)
    cases = run(method)
    assert [case["prompt_id"] for case in cases] == ["p0", "p1", "p2"]
    for case in cases:
        rows = trajectory(method, case)
        assert [row["step"] for row in rows] == list(range(9))
        assert rows[0]["cosine_to_start"] == pytest.approx(1.0) and rows[-1]["cosine_to_start"] < 0.9999
        assert case["best"]["target"] == max(row["target"] for row in rows) > case["initial"]["target"]
        assert (
            case["last"]["target"] == rows[-1]["target"]
            and "health/std" in case["last"]
            and "watch/red" in case["best"]
        )
        assert ["watch/red" in row for row in rows] == [step % 2 == 0 for step in range(9)]
        names = sorted(file.name for file in (tmp_path / case["place"] / "images").iterdir())
        assert names == ["best.png", "last.png", "step_0000.png", "step_0004.png", "step_0008.png"]


def test_a_batch_is_its_cases(model, tmp_path):
    """One graph for three cases, or three graphs: the same trajectories, shuffles and stops among them."""
    together = optimization(model, tmp_path / "a", batch_size=3)
    alone = optimization(model, tmp_path / "b", batch_size=1)
    for one, other in zip(run(together), run(alone), strict=True):
        a, b = trajectory(together, one), trajectory(alone, other)
        for name in ("target", "penalty", "cosine_to_start"):
            assert [row[name] for row in a] == pytest.approx([row[name] for row in b], rel=1e-3, abs=1e-4)


def test_gradients_are_balanced_and_clipped_case_by_case(model, tmp_path):
    method = optimization(model, tmp_path, balance=0.5, max_grad_norm=None)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaves = list(noise.split(1))
    of_target = torch.randn(3, 4, 8, 8) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    penalty, _ = Regularizer({"kl": KL()})(1.3 * torch.cat(leaves), [])
    total, norms = method.combined(of_target, penalty, leaves)
    share = (total - of_target).flatten(1).norm(dim=1) / of_target.flatten(1).norm(dim=1)
    assert share.tolist() == pytest.approx([0.5] * 3, rel=1e-4)
    method.max_grad_norm = 0.01
    penalty, _ = Regularizer({"kl": KL()})(1.3 * torch.cat(leaves), [])
    clipped, _ = method.combined(of_target, penalty, leaves)
    assert clipped.flatten(1).norm(dim=1).tolist() == pytest.approx([0.01] * 3, rel=1e-4)
    assert torch.cosine_similarity(clipped.flatten(1), total.flatten(1), dim=1).min() > 0.9999
    assert set(norms) == {"grad/target", "grad/penalty"}


def test_without_balance_gradients_are_added_as_they_are(model, tmp_path):
    method = optimization(model, tmp_path, balance=None, max_grad_norm=None)
    leaf = torch.randn(1, 4, 8, 8, requires_grad=True)
    penalty, _ = Regularizer({"kl": KL(weight=3.0)})(leaf, [])
    (expected,) = torch.autograd.grad(3 * KL()(leaf, []).sum(), leaf)
    total, _ = method.combined(torch.ones(1, 4, 8, 8), penalty, [leaf])
    torch.testing.assert_close(total, 1 + expected)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Adam, lr=0.02),
        partial(torch.optim.LBFGS, lr=1.0, max_iter=1),
        partial(Langevin, lr=20.0, noise=0.01),
        SGD,
    ],
)
def test_every_optimizer_moves_each_case_by_itself(model, tmp_path, optimizer):
    found = {}
    for size in (1, 3):
        method = optimization(
            model, tmp_path / str(size), optimizer=optimizer, regularizer=Regularizer(), iterations=4, batch_size=size
        )
        found[size] = [case["last"]["target"] for case in run(method)]
        assert all(case["best"]["target"] > case["initial"]["target"] for case in method.finished())
    assert found[1] == pytest.approx(found[3], rel=1e-3, abs=1e-5)


def test_langevin_without_a_gradient_keeps_noise_gaussian():
    x = torch.nn.Parameter(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    start, optimizer = x.detach().clone(), Langevin([x], lr=1.0, noise=0.1, seed=1)
    for _ in range(20):
        x.grad = torch.zeros_like(x)
        optimizer.step()
    assert x.std().item() == pytest.approx(1, abs=0.02) and x.mean().item() == pytest.approx(0, abs=0.02)
    cosine = torch.cosine_similarity(x.detach(), start, dim=0).item()
    assert cosine == pytest.approx(0.9**10, abs=0.02)


def test_constraints_hold_after_every_step(model, tmp_path):
    for constraint in (Renorm(), WhitenedNoise()):
        method = optimization(
            model, tmp_path / type(constraint).__name__, regularizer=Regularizer(constraint=constraint)
        )
        for case in run(method):
            assert case["last"]["health/std"] ** 2 + case["last"]["health/mean"] ** 2 == pytest.approx(1, abs=1e-4)


def test_a_plateau_stops_a_case_and_not_its_neighbours(model, tmp_path):
    class Stuck(Redness):
        def score_pixels(self, pixels, prompts):
            moving = torch.tensor([prompt.id != "p1" for prompt in prompts]).float()
            return super().score_pixels(pixels, prompts) * moving

    cases = run(optimization(model, tmp_path, reward=Stuck(), patience=3, regularizer=Regularizer(), iterations=10))
    assert [case["stopped"] for case in cases] == [None, "plateau", None]
    assert cases[1]["last"]["step"] == 3 and cases[0]["last"]["step"] == 10


def test_a_held_out_decline_stops_a_case(model, tmp_path):
    class Against(Redness):
        def __call__(self, pictures):
            return RewardOutput(-super().__call__(pictures).total)

    method = optimization(
        model,
        tmp_path,
        watch={"against": Against()},
        held_out="against",
        held_out_patience=2,
        measure_every=1,
        iterations=20,
    )
    assert all(case["stopped"] == "held-out decline" and case["last"]["step"] < 20 for case in run(method))


def test_a_killed_run_goes_on_where_it_stopped(model, tmp_path):
    """Finished cases are not done again; the others come out as if nothing had happened; another model's cases are not
    overwritten."""
    whole = run(optimization(model, tmp_path / "whole", batch_size=1))
    method = optimization(model, tmp_path / "cut", batch_size=1)
    run(method)
    (tmp_path / "cut" / "00001" / "case.json").unlink()
    before = (tmp_path / "cut" / "00000" / "case.json").stat().st_mtime_ns
    assert [case.place for case in optimization(model, tmp_path / "cut").mine()] == [1]
    again = run(optimization(model, tmp_path / "cut", batch_size=1))
    assert (tmp_path / "cut" / "00000" / "case.json").stat().st_mtime_ns == before
    assert [case["last"]["target"] for case in again] == [case["last"]["target"] for case in whole]
    with pytest.raises(UserError, match="another prompt, seed, model or judge"):
        given(optimization(model, tmp_path / "cut"), "others").mine()


def test_a_reward_that_fails_stops_the_run(model, tmp_path):
    class Broken(Redness):
        def score_pixels(self, pixels, prompts):
            return super().score_pixels(pixels, prompts) * math.nan

    with pytest.raises(UserError, match="not finite"):
        run(optimization(model, tmp_path, reward=Broken()))


def test_samples_of_a_prompt_start_from_noises_of_their_own(model, tmp_path):
    method = optimization(model, tmp_path, samples=2)
    noise = method.first_noise(method.cases())
    assert len(method.cases()) == 6 and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise, optimization(model, tmp_path, samples=2).first_noise(method.cases()))


def test_best_of_n_is_the_best_of_n(model, tmp_path):
    method = given(NoiseSearch(model, Redness(), {}, folder=tmp_path, evaluations=6))
    for case in run(method):
        targets = [row["target"] for row in trajectory(method, case)]
        assert len(targets) == 6 == len(set(targets)) and case["best"]["target"] == pytest.approx(max(targets))


def test_neighbours_have_the_stated_cosine_and_length(model, tmp_path):
    """The first four are neighbours of the first noise, whatever was better."""
    settings = {"algorithm": "zero_order", "evaluations": 9, "neighbours": 4, "cosine": 0.9, "image_every": 1}
    method = given(NoiseSearch(model, Redness(), {}, folder=tmp_path, **settings))
    cases = method.cases()
    method.texts = {case.prompt.text: method.model.encode_prompts([case.prompt.text]) for case in cases}
    for track in method.search(cases):
        first = track.noises["initial"].flatten()
        near = torch.stack([track.noises[f"step_{step:04d}"].flatten() for step in (1, 2, 3, 4)])
        assert torch.cosine_similarity(near, first[None], dim=1).tolist() == pytest.approx([0.9] * 4, abs=0.05)
        torch.testing.assert_close(near.norm(dim=1), first.norm().expand(4))
        assert track.best >= track.rows[0]["target"]


def test_rewards_without_gradients_can_be_searched(model, tmp_path):
    class Counted(Reward):
        def __call__(self, pictures):
            return RewardOutput(torch.tensor([float(np.asarray(image).mean()) for image in pictures.images]))

    cases = run(given(NoiseSearch(model, Counted(), {}, folder=tmp_path, evaluations=3)))
    assert all(case["best"]["target"] >= case["initial"]["target"] for case in cases)
    with pytest.raises(UserError, match="best_of_n, zero_order"):
        shared = {"samples": 1, "batch_size": 1, "measure_every": 1, "image_every": 1, "eta": 0.0}
        NoiseSearch.check({"algorithm": "genetic", "evaluations": 1, "neighbours": 1, "cosine": 0.5} | shared)
