"""Self-certainty, entropy and sampling against brute force in float64."""

import math

import numpy as np
import pytest
import torch

from t2i_rl.core.seeding import row_uniforms
from t2i_rl.models.autoregressive.engine.stats import entropy, sample_tokens, self_certainty, token_stats


def brute_force_certainty(row: np.ndarray) -> float:
    """KL(U || p) from its definition: sum over v of (1/V) log((1/V) / p_v)."""
    p = np.exp(row - row.max())
    p /= p.sum()
    return float(sum(1 / len(p) * math.log(1 / len(p) / value) for value in p))


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_self_certainty_is_the_forward_kl(scale):
    logits = torch.randn(6, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    expected = [brute_force_certainty(row) for row in logits.numpy()]
    np.testing.assert_allclose(self_certainty(logits).numpy(), expected, rtol=2e-5, atol=2e-6)


def test_gradient_of_self_certainty_is_p_minus_uniform():
    logits = torch.randn(5, 31, generator=torch.Generator().manual_seed(2), requires_grad=True)
    (gradient,) = torch.autograd.grad(self_certainty(logits).sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(-1) - 1 / 31, rtol=1e-5, atol=1e-7)


def test_uniform_scores_zero_and_everything_else_is_more_certain():
    assert abs(float(self_certainty(torch.full((16384,), 3.0)))) < 1e-5
    assert float(self_certainty(torch.randn(16384, generator=torch.Generator().manual_seed(0)))) > 0.1


def test_published_values_for_gaussian_logits():
    """For logits N(0, s^2) both divergences tend to s^2 / 2 = 4.5 as the vocabulary grows; the
    sum over 16384 entries falls short of it by its tail."""
    logits = 3 * torch.randn(64, 16384, generator=torch.Generator().manual_seed(0))
    assert float(self_certainty(logits).mean()) == pytest.approx(4.46, abs=0.06)
    assert float(math.log(16384) - entropy(logits).mean()) == pytest.approx(4.17, abs=0.06)


def test_statistics_are_float32_whatever_the_logits_are():
    logits = torch.randn(2, 3, 50).bfloat16()
    stats = token_stats(logits, torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool))
    assert stats.self_certainty.dtype == stats.logprobs.dtype == torch.float32
    torch.testing.assert_close(stats.self_certainty, self_certainty(logits.double()).float(), rtol=1e-4, atol=1e-5)


def test_masked_tokens_count_for_nothing():
    logits, tokens = torch.randn(2, 4, 9), torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    stats = token_stats(logits, tokens, mask)
    assert (
        (stats.logprobs[0, 2:] == 0).all()
        and (stats.self_certainty[0, 2:] == 0).all()
        and (stats.entropy[0, 2:] == 0).all()
    )


def test_sampling_follows_the_distribution_and_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    uniforms = row_uniforms([7], 40_000)[0]
    for temperature in (1.0, 0.5):
        drawn = sample_tokens(logits.expand(40_000, 4), uniforms, temperature)
        frequency = torch.bincount(drawn, minlength=4) / 40_000
        expected = (logits / temperature).softmax(-1)
        assert (frequency - expected).abs().max() < 4 * (expected * (1 - expected) / 40_000).sqrt().max()
    assert (sample_tokens(logits.expand(3, 4), uniforms[:3], 0) == 2).all()


def test_the_whole_vocabulary_can_be_drawn():
    drawn = sample_tokens(torch.zeros(20_000, 200), row_uniforms([1], 20_000)[0], 1.0)
    assert drawn.unique().numel() == 200


def test_a_rows_noise_depends_on_its_own_seed_only():
    together, alone = row_uniforms([3, 4, 5], 10), row_uniforms([4], 10)
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])
