"""Advantages, clipped loss, KL and reductions against hand computations in float64; which log-prob gives the true
gradient."""

import math

import numpy as np
import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.methods.policy.actions import Actions, PassRecord, Update
from t2i_rl.methods.policy.loss import (
    LARGEST_LOG_RATIO,
    group_advantages,
    importance_ratio,
    k3,
    policy_loss,
    token_weights,
)
from t2i_rl.methods.policy.metrics import masked_mean, update_metrics


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    std = np.std([1, 2, 3], ddof=1)
    expected = [(value - 2) / (std + 1e-4) for value in (1, 2, 3)] + [0, 0, 0]
    np.testing.assert_allclose(group_advantages(rewards, 3).numpy(), expected, rtol=1e-6)


def test_advantages_of_a_group_sum_to_zero_and_ignore_shift_and_scale():
    rewards = torch.randn(64, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, 8)
    assert advantages.view(8, 8).sum(1).abs().max() < 1e-5
    torch.testing.assert_close(
        group_advantages(rewards * 1000 + 7, 8, eps=0), group_advantages(rewards, 8, eps=0), rtol=1e-4, atol=1e-5
    )


def test_loss_and_gradient_by_hand():
    """Two samples, three tokens, one masked; ratios inside and outside the clip on both sides."""
    logprobs = torch.tensor([[-1.0, -0.5, -2.0], [-1.5, -1.0, -0.2]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.3, -0.5, -1.0], [-1.0, -1.4, -0.2]], dtype=torch.float64)
    reference = torch.tensor([[-1.1, -0.7, -2.0], [-1.5, -0.9, -0.1]], dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    beta, clip = 0.1, 0.2
    weights = token_weights(mask, "token").double()
    loss = (
        (policy_loss(logprobs, old, advantages, clip) + beta * k3(logprobs, reference)) * weights
    ).sum() / weights.sum()
    loss.backward()

    expected_loss, expected_gradient = 0.0, np.zeros((2, 3))
    for i in range(2):
        for t in range(3):
            if not mask[i, t]:
                continue
            ratio = math.exp(logprobs[i, t].item() - old[i, t].item())
            a, clipped = advantages[i].item(), min(max(ratio, 1 - clip), 1 + clip)
            d = reference[i, t].item() - logprobs[i, t].item()
            expected_loss += -min(ratio * a, clipped * a) + beta * (math.exp(d) - d - 1)
            moves = ratio * a if ratio * a <= clipped * a else 0.0
            expected_gradient[i, t] = -moves + beta * (1 - math.exp(d))
    assert loss.item() == pytest.approx(expected_loss / 5, rel=1e-12)
    np.testing.assert_allclose(logprobs.grad.numpy(), expected_gradient / 5, rtol=1e-10, atol=1e-14)


def test_the_kl_penalty_has_a_gradient_and_it_pulls_back():
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    k3(logprobs, torch.tensor([-2.0, -2.0])).sum().backward()
    assert logprobs.grad[0] > 0 > logprobs.grad[1]


def test_k3_estimates_the_kl():
    """Expectation of k3 under the policy is KL(policy || reference), by enumeration."""
    p, q = (
        torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).log_softmax(-1) for i in (1, 2)
    )
    assert (k3(p, q) >= 0).all()
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), (p.exp() * (p - q)).sum())


def test_reductions():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert token_weights(mask, "token").tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert token_weights(mask, "sequence").tolist() == [[0.25] * 4, [1, 0, 0, 0]]
    with pytest.raises(UserError, match="token, sequence"):
        token_weights(mask, "mean")


class ToyPolicy:
    """Two steps, three tokens, conditional and unconditional logits from shared parameters; everything can be
    enumerated."""

    scale, vocabulary = 3.0, 3

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        shapes = {"first": (2, 3), "second": (2, 3, 3), "shared": (3,)}
        self.parameters = {
            name: torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
            for name, shape in shapes.items()
        }
        self.reward = torch.randn(3, 3, dtype=torch.float64, generator=generator)

    def logprobs(self, convention: str) -> torch.Tensor:
        """Log-prob of every sequence, `(3, 3)`, under a convention of `t2i_rl.models.autoregressive.engine.score`."""
        first, second, shared = (self.parameters[name] for name in ("first", "second", "shared"))
        steps = []
        for conditional, unconditional in (
            (first[0] + shared, first[1] - shared),
            (second[0] + shared, second[1] - shared),
        ):
            if convention == "conditional":
                logits = conditional
            else:
                unconditional = unconditional.detach() if convention == "guided_detach_uncond" else unconditional
                logits = unconditional + self.scale * (conditional - unconditional)
            steps.append(logits.log_softmax(-1))
        return steps[0][:, None] + steps[1]

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if part is None else part).flatten()
                for part, p in zip(parts, self.parameters.values(), strict=True)
            ]
        )


@pytest.mark.parametrize(
    ("convention", "unbiased"), [("guided", True), ("conditional", False), ("guided_detach_uncond", False)]
)
def test_which_logprob_gives_the_gradient_of_the_expected_reward(convention, unbiased):
    """Images are drawn from the guided distribution. The expected GRPO gradient, sum over sequences of p_guided R grad
    log p, is compared with finite differences of the expected reward itself: only the sampler's own log-prob agrees."""
    policy = ToyPolicy()
    behaviour = policy.logprobs("guided").detach().exp()
    estimate = policy.gradient((behaviour * policy.reward * policy.logprobs(convention)).sum())
    truth = []
    for parameter in policy.parameters.values():
        for place in np.ndindex(*parameter.shape):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[place] += step
                    ends.append((policy.logprobs("guided").exp() * policy.reward).sum().item())
                    parameter[place] -= step
            truth.append((ends[0] - ends[1]) / 2e-6)
    truth = torch.tensor(truth, dtype=torch.float64)
    error = float((estimate - truth).norm() / truth.norm())
    assert (error < 1e-6) == unbiased, error
    if not unbiased:
        assert error > 0.05


FAR = [-3000.0, -95.0, -20.5, -19.0, -1.0, 0.0, 0.1, 1.0, 19.0, 20.5, 95.0, 3000.0]


def value_and_slope(loss, logprob: float) -> tuple[float, float]:
    logprobs = torch.tensor([[logprob]], requires_grad=True)
    value = loss(logprobs).sum()
    value.backward()
    return value.item(), logprobs.grad.item()


@pytest.mark.parametrize("logprob", FAR)
def test_k3_and_its_slope_in_closed_form_however_far_a_token_is(logprob):
    """`e^d - d - 1` with `d = min(-logprob, 20)`: beyond 20 nats it stands still."""
    value, slope = value_and_slope(lambda logprobs: k3(logprobs, torch.zeros(1, 1)), logprob)
    d = min(-logprob, LARGEST_LOG_RATIO)
    assert value == pytest.approx(math.exp(d) - d - 1, rel=1e-6, abs=1e-6)
    assert slope == pytest.approx(1 - math.exp(d) if -logprob <= LARGEST_LOG_RATIO else 0.0, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("logprob", FAR)
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 1.5])
def test_the_clipped_loss_and_its_slope_in_closed_form_however_far_a_token_is(logprob, advantage):
    value, slope = value_and_slope(
        lambda logprobs: policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([advantage]), 0.2), logprob
    )
    ratio = math.exp(min(logprob, LARGEST_LOG_RATIO))
    clipped = min(max(ratio, 0.8), 1.2)
    assert value == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-6, abs=1e-6)
    moves = ratio * advantage < clipped * advantage or ratio == clipped
    wanted = -ratio * advantage if moves and logprob <= LARGEST_LOG_RATIO else 0.0
    assert slope == (0.0 if wanted == 0 else pytest.approx(wanted, rel=1e-6))


def test_ordinary_ratios_and_kl_are_what_they_were_to_the_last_bit():
    difference = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(importance_ratio(difference), difference.exp())
    assert torch.equal(k3(-difference, torch.zeros_like(difference)), difference.exp() - difference - 1)


def test_padding_and_runaway_tokens_leave_metrics_finite():
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(torch.tensor([[1.0, float("inf")], [2.0, 3.0]]), mask) == 2.0
    mask = torch.tensor([[True, True]])
    actions = Actions(torch.zeros(1, 2), mask, torch.tensor([0]), {"image": slice(None)})
    one, ratio = torch.ones(1, 2), importance_ratio(torch.tensor([[500.0, 0.0]]))
    update = Update([PassRecord(actions, torch.tensor(0.5), one, one, ratio)], torch.tensor(1.0), torch.tensor(2.0))
    measured = update_metrics([update], clip_range=0.2)
    assert all(map(math.isfinite, measured.values())) and measured["train/clip_fraction"] == 0.5
