"""Two processes give what one gives on the same global batch: rollouts, gradients, weights after training."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from t2i_rl.data.prompts import PromptData
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.rewards.self_certainty import SelfCertainty
from tests.support.tiny import PROMPTS, load_tiny_janus, save_tiny_janus
from tests.support.training import quiet_trainer


class ThreePrompts(PromptData):
    def __init__(self):
        L.LightningDataModule.__init__(self)
        self.prompts, self.batch_size, self.seed = PROMPTS, 2, 0


def train(folder: str, ranks: int, loss_reduction: str) -> dict[str, torch.Tensor]:
    """Plain SGD: the change of a weight is its gradient. Plans differ in length, so ranks differ in tokens."""
    optimizer = partial(torch.optim.SGD, lr=1.0)
    module = GRPO(
        load_tiny_janus(folder),
        SelfCertainty(),
        group_size=3,
        micro_batch_size=2,
        optimizer=optimizer,
        kl_coef=0.1,
        max_grad_norm=1e9,
        loss_reduction=loss_reduction,
    )
    quiet_trainer(2, ranks).fit(module, ThreePrompts())
    return module.state_dict()


@pytest.mark.parametrize("loss_reduction", ["token", pytest.param("prompt", marks=pytest.mark.slow)])
def test_two_ranks_train_as_one(tmp_path, loss_reduction):
    folder = save_tiny_janus(tmp_path)
    start = GRPO(load_tiny_janus(folder), SelfCertainty(), optimizer=torch.optim.SGD, kl_coef=0.0).state_dict()
    one, two = train(folder, 1, loss_reduction), train(folder, 2, loss_reduction)
    change = max(float((one[name] - start[name]).abs().max()) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4 * change)


def test_the_loader_serves_one_rank_everything():
    data = ThreePrompts()
    data.trainer = type("T", (), {"lightning_module": type("M", (), {"rollouts_done": 0})})
    assert isinstance(data.train_dataloader(), DataLoader) and len(next(iter(data.train_dataloader()))) == 2
