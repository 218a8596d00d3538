"""The control that knows nothing: what moves under it is not due to the reward."""

from t2i_rl.rewards.output import RewardOutput
from t2i_rl.rollout.buffer import Rollout
from t2i_rl.seeding import row_uniforms


class Random:
    """A uniform number in [0, 1) for each row, a function of the row's sampling seed (so a resumed run sees the same)."""

    needs_images = False
    reads_nothing = True  # of what was drawn
    distribution = None

    def __call__(self, rollout: Rollout) -> RewardOutput:
        return RewardOutput(row_uniforms([seed + 2 for seed in rollout.seeds], 1)[:, 0])
