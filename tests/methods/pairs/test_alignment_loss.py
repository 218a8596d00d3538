"""SoftREPA's and AGSM's equations against closed forms, brute force and finite differences in float64."""

import math

import pytest
import torch

from t2i_rl.methods.pairs.loss import (
    agsm_targets,
    alignment_guidance,
    pair_errors,
    softrepa_floor,
    softrepa_logits,
    softrepa_loss,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("texts", [2, 4, 8, 16])
def test_softrepa_at_chance_and_at_its_floor(texts):
    own = torch.arange(texts)
    equal = torch.full((texts, texts), 0.3, dtype=torch.float64)
    torch.testing.assert_close(softrepa_loss(equal, own), torch.full((texts,), math.log(texts), dtype=torch.float64))
    best = torch.where(torch.eye(texts, dtype=torch.bool), 0.0, 1e9).double()
    torch.testing.assert_close(
        softrepa_loss(best, own), torch.full((texts,), softrepa_floor(texts), dtype=torch.float64)
    )
    assert softrepa_floor(4) == pytest.approx(0.0535, abs=5e-5) and softrepa_floor(8) == pytest.approx(0.1206, abs=5e-5)


def test_softrepa_is_the_double_exponential_by_hand():
    errors = normal(3, 5).square() / 10
    own = torch.tensor([0, 4, 2])
    expected = []
    for row in range(3):
        scores = [math.exp(4.0 * math.exp(-float(error) / 0.07)) for error in errors[row]]
        expected.append(-math.log(scores[own[row]] / sum(scores)))
    torch.testing.assert_close(softrepa_loss(errors, own), torch.tensor(expected, dtype=torch.float64))
    plain = torch.nn.functional.cross_entropy(-errors / 0.07, own, reduction="none")
    assert (softrepa_loss(errors, own) - plain).abs().max() > 0.1


@pytest.mark.parametrize("error, own_slope, other_slope", [(0.1, 2.568, -0.856), (0.6, 2.0e-3, -6.8e-4)])
def test_softrepa_gradient_at_equality_and_how_it_vanishes(error, own_slope, other_slope):
    """The mean loss of 4 images: own errors are pushed down, (B - 1) times as hard as each other one up."""
    errors = torch.full((4, 4), error, dtype=torch.float64, requires_grad=True)
    softrepa_loss(errors, torch.arange(4)).mean().backward()
    assert float(errors.grad[0, 0]) == pytest.approx(own_slope, rel=2e-2)
    assert float(errors.grad[0, 1]) == pytest.approx(other_slope, rel=2e-2)
    assert float(errors.grad[0, 0] / errors.grad[0, 1]) == pytest.approx(-3)


def test_softrepa_softmax_goes_over_texts_not_over_images():
    errors = normal(4, 4).square() / 10
    own = torch.arange(4)
    assert (softrepa_loss(errors, own) - softrepa_loss(errors.T, own)).abs().max() > 0.05


def test_softrepa_sensitivity():
    for error, expected in ((0.02, 43), (0.05, 28), (0.1, 14), (0.2, 3.3), (0.4, 0.19), (0.8, 6e-4)):
        at = torch.tensor(error, dtype=torch.float64, requires_grad=True)
        softrepa_logits(at).backward()
        assert float(-at.grad) == pytest.approx(expected, rel=0.05)


def test_errors_are_means_or_sums_over_an_image():
    predicted, target = normal(2, 3, 4, 5, 5), normal(2, 1, 4, 5, 5, seed=1)
    for row in range(2):
        for text in range(3):
            gap = (predicted[row, text] - target[row, 0]).flatten()
            assert float(pair_errors(predicted, target)[row, text]) == pytest.approx(float(gap @ gap) / 100)
            assert float(pair_errors(predicted, target, "sum")[row, text]) == pytest.approx(float(gap @ gap))


@pytest.mark.parametrize("reduction, temperature", [("mean", 0.1), ("sum", 1.0)])
def test_alignment_guidance_by_brute_force(reduction, temperature):
    reference, target = normal(3, 4, 2, 3, 3), normal(3, 2, 3, 3, seed=1)
    weights, delta = alignment_guidance(reference, target, temperature, reduction)
    for i in range(3):
        rewards = []
        for j in range(4):
            gap = ((reference[i, j] - target[i]) ** 2).sum().item()
            rewards.append(-(gap / 18 if reduction == "mean" else gap) / temperature)
        shares = [math.exp(r - max(rewards)) for r in rewards]
        shares = [share / sum(shares) for share in shares]
        mean = sum(share * reference[i, j] for j, share in enumerate(shares))
        for j in range(4):
            assert float(weights[i, j]) == pytest.approx(shares[j], abs=1e-12)
            torch.testing.assert_close(delta[i, j], reference[i, j] - mean)
    torch.testing.assert_close(torch.einsum("ij,ijchw->ichw", weights, delta), torch.zeros(3, 2, 3, 3).double())


def test_guidance_is_exact_under_autocast():
    """Texts of one image differ by a few thousandths: bfloat16 products would round that away."""
    target = normal(2, 4, 8, 8).float()
    reference = (target.unsqueeze(1) + 0.003 * normal(2, 8, 4, 8, 8, seed=1)).float()
    with torch.autocast("cpu", torch.bfloat16):
        weights, delta = alignment_guidance(reference, target)
    exact, expected = alignment_guidance(reference.double(), target.double())
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weights.double(), exact, atol=1e-6, rtol=1e-5)


def test_guidance_is_the_gradient_of_the_log_plackett_luce_probability():
    """With the Jacobian taken as one: grad log p(own) = grad r_own - sum_k w_k grad r_k,
    where grad r_j = -(prediction_j - target) up to a constant; checked by finite differences on the shared target's
    offset."""
    reference, target = normal(1, 4, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
    own, temperature, h = 2, 0.7, 1e-5
    _, delta = alignment_guidance(reference, target, temperature, "sum")

    def log_probability(shift):  # every prediction moves with x_t alike (J = 1), the noise stays
        errors = pair_errors(reference + shift, target.unsqueeze(1), "sum")
        return torch.log_softmax(-errors / temperature, dim=1)[0, own]

    for place in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[place] = h
        shift = shift.view(1, 1, 1, 2, 2)
        slope = (log_probability(shift) - log_probability(-shift)) / (2 * h)
        assert float(slope) == pytest.approx(float(-2 / temperature * delta[0, own].flatten()[place]), rel=1e-6)


def test_equal_texts_or_zero_gammas_leave_plain_denoising():
    target = normal(3, 2, 3, 3, seed=1)
    same = normal(3, 1, 2, 3, 3).expand(3, 4, 2, 3, 3)
    own = torch.tensor([0, 1, 3])
    _, delta = alignment_guidance(same, target)
    torch.testing.assert_close(delta, torch.zeros_like(delta))
    plain = target.unsqueeze(1).expand(3, 4, 2, 3, 3)
    torch.testing.assert_close(agsm_targets(target, delta, own, 1.0, 0.1), plain)
    _, delta = alignment_guidance(normal(3, 4, 2, 3, 3), target)
    assert torch.equal(agsm_targets(target, delta, own, 0.0, 0.0), plain)


def test_targets_move_towards_the_own_text_and_away_from_others_without_gradient():
    reference = normal(2, 3, 1, 2, 2).requires_grad_()
    target, own = normal(2, 1, 2, 2, seed=1), torch.tensor([1, 2])
    weights, delta = alignment_guidance(reference, target)
    targets = agsm_targets(target, delta, own, 1.0, 0.25)
    assert not (weights.requires_grad or delta.requires_grad or targets.requires_grad)
    for i in range(2):
        for j in range(3):
            sign = 1.0 if j == own[i] else -0.25
            torch.testing.assert_close(targets[i, j], target[i] + sign * delta[i, j])


def test_mean_weights_are_near_chance_and_summed_ones_near_one_hot():
    """With the released constants the weights hardly leave 1/B; the paper's sum is another algorithm."""
    noise = normal(1, 4, 64, 64)
    reference = noise.unsqueeze(1) + 0.3 * normal(1, 4, 4, 64, 64, seed=1)
    reference = reference * torch.tensor([1.0, 1.02, 1.02, 1.02]).view(1, 4, 1, 1, 1)
    weights, _ = alignment_guidance(reference, noise)
    assert (weights - 0.25).abs().max() < 0.05
    summed, _ = alignment_guidance(reference, noise, 1.0, "sum")
    assert summed.max() > 0.999
