"""IRIS as its public code has it, recomputed in float64 from the formula; and what one token weighs under each loss
reduction."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from numpy.testing import assert_allclose

from t2i_rl.core.errors import UserError
from t2i_rl.methods.policy.loss import group_advantages, token_weights
from t2i_rl.models.autoregressive.engine.stats import token_stats
from t2i_rl.models.autoregressive.rollout import TokenRollout
from t2i_rl.rewards.self_certainty import SelfCertainty
from tests.support.commands import composed

GROUP, PROMPTS = 8, 3
TEXT_VOCABULARY, IMAGE_VOCABULARY, IMAGE_TOKENS, LONGEST_PLAN = 900, 150, 24, 20
ROWS = GROUP * PROMPTS


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of plans and images, each row as sharp as it likes, and the lengths of the plans."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(ROWS, LONGEST_PLAN, TEXT_VOCABULARY, generator=generator) * (
        1 + torch.rand(ROWS, 1, 1, generator=generator)
    )
    image = torch.randn(ROWS, IMAGE_TOKENS, IMAGE_VOCABULARY, generator=generator) * (
        1 + torch.rand(ROWS, 1, 1, generator=generator)
    )
    return text, image, torch.randint(1, LONGEST_PLAN + 1, (ROWS,), generator=generator)


def rollout_of(text: torch.Tensor, image: torch.Tensor, lengths: torch.Tensor) -> TokenRollout:
    plan_mask = torch.arange(text.shape[1]) < lengths[:, None]
    image_mask = torch.ones(image.shape[:2], dtype=torch.bool)
    nothing = torch.zeros(len(text), 1, dtype=torch.long)
    rollout = TokenRollout(
        prompts=[None] * len(text),
        group_size=GROUP,
        seeds=[0] * len(text),
        plans=[""] * len(text),
        image_ids=nothing,
        image_mask=nothing,
        image_tokens=nothing,
        drawn=None,
        text_vocabulary=TEXT_VOCABULARY,
        image_vocabulary=IMAGE_VOCABULARY,
    )
    rollout.text_stats = token_stats(text, torch.zeros(text.shape[:2], dtype=torch.long), plan_mask)
    rollout.image_stats = token_stats(image, torch.zeros(image.shape[:2], dtype=torch.long), image_mask)
    return rollout


def released_advantages(text: torch.Tensor, image: torch.Tensor, lengths: torch.Tensor) -> np.ndarray:
    """From the logits alone, in float64: minus (logsumexp - mean) of a token, one mean over a row's tokens of both
    kinds, and the deviation from the group's mean over its unbiased standard deviation plus 1e-4."""
    rewards = []
    for row in range(len(text)):
        tokens = [*text[row, : lengths[row]].double().numpy(), *image[row].double().numpy()]
        rewards.append(np.mean([-(np.logaddexp.reduce(token) - token.mean()) for token in tokens]))
    groups = np.reshape(rewards, (-1, GROUP))
    deviations = groups - groups.mean(1, keepdims=True)
    return (deviations / (groups.std(1, ddof=1, keepdims=True) + 1e-4)).ravel()


def test_the_released_settings_give_the_released_advantages(logits):
    reward = instantiate(composed("reward=nsc", "variant=released").reward)
    rollout, expected = rollout_of(*logits), released_advantages(*logits)
    assert_allclose(group_advantages(reward(rollout).total, GROUP).numpy(), expected, atol=1e-5)
    for other in (SelfCertainty(), SelfCertainty(aggregation="token_mean"), SelfCertainty(constant="kept")):
        ours = group_advantages(other(rollout).total, GROUP).numpy()
        assert np.abs(ours - expected).max() > 1e-2  # neither setting alone would do


def test_log_v_grows_with_a_plan_where_it_is_kept_and_not_where_it_is_taken_off():
    """Tokens that know nothing: ours scores every plan 0; kept, the constant of two vocabularies tells plans apart by
    length alone."""
    lengths = torch.arange(1, GROUP + 1)
    text, image = torch.zeros(GROUP, GROUP, TEXT_VOCABULARY), torch.zeros(GROUP, IMAGE_TOKENS, IMAGE_VOCABULARY)
    rollout = rollout_of(text, image, lengths)
    assert SelfCertainty(aggregation="token_mean")(rollout).total.abs().max() < 1e-5
    kept = SelfCertainty(aggregation="token_mean", constant="kept")(rollout).total
    constants = lengths * np.log(TEXT_VOCABULARY) + IMAGE_TOKENS * np.log(IMAGE_VOCABULARY)
    assert_allclose(kept.numpy(), -(constants / (lengths + IMAGE_TOKENS)).numpy(), rtol=1e-6)


def test_one_modality_is_averaged_over_its_own_tokens(logits):
    rollout = rollout_of(*logits)
    image = SelfCertainty(text_sign=0, aggregation="token_mean")(rollout).total
    torch.testing.assert_close(image, -rollout.image_stats.self_certainty.double().mean(-1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"constant": "halved"}, "subtracted, kept"), ({"constant": "kept", "divergence": "backward"}, "no backward KL")],
)
def test_a_constant_that_cannot_be_is_refused_in_one_line(settings, named):
    with pytest.raises(UserError, match=named) as error:
        SelfCertainty(**settings)
    assert "\n" not in str(error.value)


def test_method_and_model_follow_the_variant_and_what_is_given_wins():
    cfg = composed("method=iris", "model=janus_pro_1b", "variant=released")
    assert cfg.method.loss_reduction == "prompt" and cfg.method.image_loss_weight == 1.0
    assert cfg.model.chat.final_stop == "keep"
    given = composed("variant=released", "reward.constant=subtracted", "method.loss_reduction=token")
    assert (given.reward.constant, given.method.loss_reduction) == ("subtracted", "token")


def test_every_reduction_is_its_definition_token_by_token():
    """Unequal lengths in float64, by loops: over the batch, over samples, and over prompts of three samples."""
    generator = np.random.default_rng(0)
    losses, lengths = generator.normal(size=(12, 9)), generator.integers(1, 10, 12)
    mask = torch.from_numpy(np.arange(9) < lengths[:, None])
    per_row = [losses[row, : lengths[row]] for row in range(12)]
    expected = {
        "token": np.concatenate(per_row).mean(),
        "sequence": np.mean([row.mean() for row in per_row]),
        "prompt": np.mean([np.concatenate(per_row[first : first + 3]).mean() for first in range(0, 12, 3)]),
    }
    for reduction, value in expected.items():
        weights = token_weights(mask, reduction, group_size=3).double().numpy()
        assert (weights * losses).sum() / weights.sum() == pytest.approx(value, rel=1e-6), reduction
    assert len({round(value, 6) for value in expected.values()}) == 3


@pytest.mark.parametrize("reduction", ["sequence", "prompt"])
def test_a_modality_of_weight_zero_takes_no_share_of_its_sample_or_prompt(reduction):
    weights = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert token_weights(weights, reduction, group_size=2)[:, 2:].unique().numel() == 1
    assert float(token_weights(weights, reduction, group_size=2).sum()) == (4 if reduction == "sequence" else 2)
