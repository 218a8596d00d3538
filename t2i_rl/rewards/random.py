"""The control that knows nothing: what moves under it is not due to the reward."""

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.seeding import row_uniforms


class Random(Reward):
    """A uniform number in [0, 1) for each row, by the row's seed: a resumed run sees the same."""

    needs_images = False

    def __call__(self, drawn: Drawn) -> RewardOutput:
        return RewardOutput(row_uniforms([seed + 2 for seed in drawn.seeds], 1)[:, 0])
