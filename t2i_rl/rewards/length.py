"""The control for plan length: `sign=1` rewards longer plans, `sign=-1` shorter ones."""

from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.numbers import Direction
from t2i_rl.models.autoregressive.rollout import TokenRollout


class Length(Reward):
    """Plan length in tokens, EOS included, times `sign`."""

    reads = TokenRollout
    needs_images = False
    needs_plans = True

    def __init__(self, sign: Direction = 1):
        self.sign = sign

    def __call__(self, rollout: TokenRollout) -> RewardOutput:
        return RewardOutput(self.sign * rollout.plan_token_mask.sum(-1).double())
