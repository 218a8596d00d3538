"""The control for plan length: `sign=1` rewards longer plans, `sign=-1` shorter ones."""

from t2i_rl.core.numbers import Direction
from t2i_rl.rewards.output import RewardOutput
from t2i_rl.rollout.buffer import Rollout


class Length:
    """Plan length in tokens, EOS included, times `sign`."""

    needs_images = False
    needs_plans = True
    distribution = None

    def __init__(self, sign: Direction = 1):
        self.sign = sign

    def __call__(self, rollout: Rollout) -> RewardOutput:
        return RewardOutput(self.sign * rollout.plan_token_mask.sum(-1).double())
