"""The absence of a reward, for methods that learn from pairs of images and texts."""

from t2i_rl.rewards.output import RewardOutput
from t2i_rl.rollout.buffer import Rollout


class NoReward:
    """Nothing to be trained on; a method that samples refuses it before any weight loads."""

    needs_images = False
    distribution = None

    def __call__(self, rollout: Rollout) -> RewardOutput:
        raise ValueError("reward=none rewards nothing")
