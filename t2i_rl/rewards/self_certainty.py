"""Self-certainty of the model's own text and image tokens, minimised (IRIS) or maximised."""

import math

import torch

from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Sign, Weight, check_arguments
from t2i_rl.models.autoregressive.engine.stats import TokenStats
from t2i_rl.models.autoregressive.rollout import TokenRollout

AGGREGATIONS = ("modality_mean", "token_mean", "sum")
DIVERGENCES = ("forward", "backward")
CONSTANTS = ("subtracted", "kept")


class SelfCertainty(Reward):
    """`reward = sum over modalities of sign * weight * aggregated certainty` (IRIS section 3).

    The certainty of a token is KL(U || p) (`divergence=forward`, Kang et al. 2025) or KL(p || U) =
    log V - H(p) (`backward`, the entropy variant). NSC, the IRIS reward, has both signs -1: it goes
    up when the distribution gets flatter, and a uniform one scores 0.

    Args:
        text_sign, image_sign: -1 minimise, +1 maximise, 0 leave out.
        text_weight, image_weight: of each modality beside its sign.
        divergence: `forward` or `backward`.
        aggregation: `modality_mean` is the mean over plan tokens plus the mean over image tokens
            (ours). `token_mean` is one mean over the tokens of all modalities that count (IRIS's
            released code). `sum` is as reviews quote the paper; every term has one sign, so that it
            mostly rewards short plans.
        constant: `subtracted` takes log V off, which makes a token's certainty a divergence; `kept`
            leaves logsumexp - mean, as IRIS's released code does. Plan and image tokens have other
            vocabularies, so that the constant depends on a plan's length and does not cancel within
            a group.
        distribution: `conditional` is the prompt's own, without guidance; `guided` is the one that
            was sampled (docs/logprob.md).

    Raises:
        UserError: an option outside its choices, or `constant=kept` with `divergence=backward`,
            which has no such form.
    """

    reads = TokenRollout
    needs_images = False

    def __init__(
        self,
        text_sign: Sign = -1,
        image_sign: Sign = -1,
        text_weight: Weight = 1.0,
        image_weight: Weight = 1.0,
        divergence: str = "forward",
        aggregation: str = "modality_mean",
        constant: str = "subtracted",
        distribution: str = "conditional",
    ):
        if aggregation not in AGGREGATIONS:
            raise UserError(f"reward.aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
        if divergence not in DIVERGENCES:
            raise UserError(f"reward.divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
        if constant not in CONSTANTS:
            raise UserError(f"reward.constant must be one of {', '.join(CONSTANTS)}, not {constant!r}")
        if constant == "kept" and divergence == "backward":
            raise UserError(
                "reward.constant=kept belongs to reward.divergence=forward (logsumexp - mean); IRIS's released code "
                "has no backward KL, so variant=released has none: take variant=ours or reward.constant=subtracted"
            )
        if distribution not in ("conditional", "guided"):
            raise UserError(f"reward.distribution must be conditional or guided, not {distribution!r}")
        check_arguments(SelfCertainty, locals(), "reward")
        if text_sign == image_sign == 0:
            raise UserError("reward.text_sign and reward.image_sign must not both be 0: nothing would be rewarded")
        self.text_scale, self.image_scale = text_sign * text_weight, image_sign * image_weight
        self.divergence, self.aggregation, self.distribution = divergence, aggregation, distribution
        self.constant = constant

    def __call__(self, rollout: TokenRollout) -> RewardOutput:
        image_sum, image_count = self._certainty(rollout.image_stats, rollout.image_vocabulary)
        if rollout.text_stats is None:
            text_sum, text_count = torch.zeros_like(image_sum), torch.zeros_like(image_count)
        else:
            text_sum, text_count = self._certainty(rollout.text_stats, rollout.text_vocabulary)
        if self.aggregation == "modality_mean":
            text, image = text_sum / text_count.clamp(min=1), image_sum / image_count
        elif self.aggregation == "token_mean":
            total = (text_count * (self.text_scale != 0) + image_count * (self.image_scale != 0)).clamp(min=1)
            text, image = text_sum / total, image_sum / total
        else:
            text, image = text_sum, image_sum
        text, image = self.text_scale * text, self.image_scale * image
        return RewardOutput(text + image, {"text": text, "image": image})

    def _certainty(self, stats: TokenStats, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over a row's tokens and their number, float64 `(B,)`."""
        mask = stats.mask.double()
        if self.divergence == "forward":
            values = stats.self_certainty.double()
        else:
            values = math.log(vocabulary) - stats.entropy.double()
        if self.constant == "kept":
            values = values + math.log(vocabulary)
        return (values * mask).sum(-1), mask.sum(-1)
