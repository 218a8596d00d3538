"""The absence of a reward, for methods that learn from pairs of images and texts."""

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput


class NoReward(Reward):
    """Nothing to be trained on; a method that samples refuses it before any weight loads."""

    needs_images = False

    def __call__(self, drawn: Drawn) -> RewardOutput:
        raise ValueError("reward=none rewards nothing")
