"""The differentiable stand-in for the oracle: its arithmetic against brute force, its reading of
renders, and that it can be fooled where the oracle cannot."""

import itertools

import numpy as np
import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import to_bytes
from t2i_rl.core.places import PACKAGE
from t2i_rl.core.prompts import Prompt
from t2i_rl.pretrain.recognizer import LabelledScenes, agreement
from t2i_rl.rewards.pixels import to_unit
from t2i_rl.rewards.soft_oracle import SoftOracle, exactly, related
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.recognizer import COLOR_NAMES, GRID, Recognizer, cells_of
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import LARGE_SHAPES, Object, Scene, sample_scene
from t2i_rl.shapes.suites import select_prompts, wishes

WEIGHTS = PACKAGE / "weights" / "recognizer"


@pytest.fixture(scope="module")
def oracle() -> SoftOracle:
    return SoftOracle(str(WEIGHTS))


def rendered(prompts, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([render(sample_scene(wishes(prompt), rng)) for prompt in prompts])


def test_counts_are_poisson_binomial():
    p = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for count in range(5):
        expected = []
        for row in p:
            total = 0.0
            for happens in itertools.product([0, 1], repeat=6):
                if sum(happens) == count:
                    total += torch.stack([q if yes else 1 - q for q, yes in zip(row, happens, strict=True)]).prod()
            expected.append(total)
        torch.testing.assert_close(exactly(p, [count, count]), torch.stack(expected))
    with pytest.raises(UserError, match="counts to 6"):
        exactly(p, [7, 1])


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_relations_are_sums_over_pairs_of_cells(relation):
    a, b = torch.rand(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for i, j in itertools.product(range(64), repeat=2):
        dx, dy = i % GRID - j % GRID, i // GRID - j // GRID
        holds = {
            "left of": -dx >= abs(dy) and dx < 0,
            "right of": dx >= abs(dy) and dx > 0,
            "above": -dy >= abs(dx) and dy < 0,
            "below": dy >= abs(dx) and dy > 0,
        }
        total += float(a[i] * b[j]) * holds[relation]
    assert related(a, b, relation).item() == pytest.approx(total / float(a.sum() * b.sum()))


def test_labels_are_where_the_objects_are():
    scene = Scene((Object("square", "red", 8.0, 25.0, 5.0), Object("circle", "blue", 24.5, 9.0, 4.5)))
    present, shape, color = cells_of(scene)
    assert present.nonzero()[:, 0].tolist() == [2 * GRID + 6, 6 * GRID + 2]
    cell = 6 * GRID + 2
    assert LARGE_SHAPES[shape[cell]] == "square" and COLOR_NAMES[color[cell]] == "red" and (shape == -100).sum() == 62


def test_the_shipped_recogniser_reads_renders():
    right = agreement(Recognizer.load(WEIGHTS), count=300, seed=5)
    assert right["low"] > 0.97


def test_renders_of_a_prompt_score_high_and_of_another_low(oracle):
    prompts = select_prompts("test", 6)
    own = oracle.score_pixels(to_unit(rendered(prompts)), prompts)
    others = oracle.score_pixels(to_unit(rendered(prompts)), prompts[1:] + prompts[:1])
    assert own.median() > -0.5 and (own > -3).float().mean() > 0.9
    assert (own > others).float().mean() > 0.9 and others.mean() < -8


def test_gradients_are_those_of_finite_differences(oracle):
    prompts = select_prompts("test", 1)
    pixels = torch.rand(len(prompts), 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    double = SoftOracle(str(WEIGHTS), floor=0.0)
    double.recognizer.double()
    leaf = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(double.score_pixels(leaf, prompts).sum(), leaf)
    direction, step = torch.randn(pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1e-5
    slope = (
        double.score_pixels(pixels + step * direction, prompts)
        - double.score_pixels(pixels - step * direction, prompts)
    ).sum() / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_a_batch_is_its_rows(oracle):
    prompts = select_prompts("test", 2)
    pixels = to_unit(rendered(prompts))
    alone = torch.cat([oracle.score_pixels(pixels[i : i + 1], [prompt]) for i, prompt in enumerate(prompts)])
    torch.testing.assert_close(oracle.score_pixels(pixels, prompts), alone, rtol=1e-4, atol=1e-4)


def test_it_can_be_fooled_and_the_oracle_cannot(oracle):
    """Climbing it in pixels: it grows sure of three red circles in what the oracle finds nothing of
    the kind."""
    prompt = Prompt(
        "x", "three red circles", "counting", {"include": [{"class": "circle", "count": 3, "color": "red"}]}
    )
    pixels = torch.full((1, 3, 32, 32), 0.94) + 0.02 * torch.randn(
        1, 3, 32, 32, generator=torch.Generator().manual_seed(0)
    )
    pixels.requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=0.01)
    before = oracle.score_pixels(pixels, [prompt]).item()
    for _ in range(200):
        optimizer.zero_grad()
        (-oracle.score_pixels(pixels, [prompt]).sum()).backward()
        optimizer.step()
        pixels.data.clamp_(0, 1)
    after = oracle.score_pixels(pixels, [prompt]).item()
    whole = [item for item in detect(to_bytes(pixels))[0] if not item.malformed]
    assert after > -0.5 > before and len(whole) < 3


def test_what_it_cannot_judge_is_refused(oracle):
    assert "texture" in oracle.refuses(
        Prompt("x", "", "texture", {"include": [{"class": "circle", "count": 1, "texture": "hollow"}]})
    )
    assert "no shape" in oracle.refuses(Prompt("x", "", "t", {"include": [{"class": "dog", "count": 1}]}))
    assert oracle.refuses(Prompt("x", "", "t", {"include": [{"class": "circle", "count": 1}]})) is None


def test_training_batches_are_a_function_of_seed_and_number():
    first, again, later = (next(iter(LabelledScenes(4, 0, start))) for start in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], later[0])
    assert first[0].shape == (4, 3, 32, 32) and first[1].sum() >= 4
