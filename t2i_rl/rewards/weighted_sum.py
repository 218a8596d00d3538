"""Several rewards as one: T2I-R1's ensemble."""

import torch

from t2i_rl.core.contract_checks import check_reward, checked
from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Factor, SignedWeight, check_arguments
from t2i_rl.core.prompts import Prompt

NORMALIZATIONS = ("none", "group")


class WeightedSum(Reward):
    """`sum of weight * part` (T2I-R1 section 3.4, where all weights are 1).

    The paper's average and the released code's sum give the same advantages, but for the 1e-4 that
    is added to a group's deviation.

    Args:
        parts: rewards by name.
        weights: by name; a part of weight 0 is still computed and logged.
        normalize: `none`, or `group`: each part is centred and divided by its standard deviation
            within a prompt's group first, so that one whose range is narrow (HPS varies ten times
            less than the others) is heard as much as the others.
        eps: added to that deviation.

    Raises:
        UserError: weights and parts name different things, or an unknown normalisation.
    """

    def __init__(
        self, parts: dict, weights: dict[str, SignedWeight | None], normalize: str = "none", eps: Factor = 1e-6
    ):
        check_arguments(WeightedSum, locals(), "reward")
        parts = {name: part for name, part in parts.items() if part is not None}
        weights = {name: weight for name, weight in weights.items() if weight is not None}
        if set(parts) != set(weights) or not parts:
            names = f"reward.weights names {sorted(weights)}, reward.parts {sorted(parts)}"
            raise UserError(f"{names}: give a weight for each part, and no other")
        if not any(weights.values()):
            raise UserError("reward.weights are all 0: nothing would be rewarded")
        if normalize not in NORMALIZATIONS:
            raise UserError(f"reward.normalize must be one of {', '.join(NORMALIZATIONS)}, not {normalize!r}")
        for name, part in parts.items():
            check_reward(part, f"reward.parts.{name}")
        distributions = sorted({part.distribution for part in parts.values()} - {None})
        if len(distributions) > 1:
            raise UserError(f"reward.parts read different distributions ({', '.join(distributions)}): one run has one")
        self.parts, self.weights, self.normalize, self.eps = parts, dict(weights), normalize, eps
        self.distribution = distributions[0] if distributions else None
        self.reads = next((part.reads for part in parts.values() if part.reads is not Drawn), Drawn)
        self.needs_images = any(part.needs_images for part in parts.values())
        self.needs_plans = any(part.needs_plans for part in parts.values())
        self.needs_meta = tuple(dict.fromkeys(key for part in parts.values() for key in part.needs_meta))
        sizes = [set(part.image_sizes) for part in parts.values() if part.image_sizes]
        self.image_sizes = tuple(sorted(set.intersection(*sizes))) if sizes else ()

    def refuses(self, prompt: Prompt) -> str | None:
        """Why one of the parts cannot judge a prompt."""
        reasons = (part.refuses(prompt) for part in self.parts.values())
        return next((why for why in reasons if why), None)

    def __call__(self, drawn: Drawn) -> RewardOutput:
        outputs = {name: checked(part(drawn), len(drawn), name) for name, part in self.parts.items()}
        totals = {name: output.total.double().cpu() for name, output in outputs.items()}
        summed = torch.zeros(len(drawn), dtype=torch.float64)
        for name, total in totals.items():
            heard = self._by_group(total, drawn.group_size) if self.normalize == "group" else total
            summed += self.weights[name] * heard
        return RewardOutput(summed, totals)

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """The sum `(B,)` with gradients to float32 pixels `(B, 3, H, W)` in [0, 1].

        Every part must have such gradients.
        """
        scores = {name: part.score_pixels(pixels, prompts) for name, part in self.parts.items()}
        return sum(self.weights[name] * score.to(pixels.device) for name, score in scores.items())

    @property
    def differentiable(self) -> bool:
        """Whether all parts are, and there are no groups to normalise by."""
        return self.normalize == "none" and all(part.differentiable for part in self.parts.values())

    def _by_group(self, values: torch.Tensor, group_size: int) -> torch.Tensor:
        groups = values.view(-1, group_size)
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + self.eps)).flatten()
