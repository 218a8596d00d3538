"""A run in which there is nothing to learn from says so, once."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from t2i_rl.callbacks.no_spread import NoSpread
from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.data.prompts import PromptBatches
from t2i_rl.evaluation.tables import headline
from tests.methods.policy.test_tokens import build
from tests.support.tiny import PROMPTS, save_tiny_janus


def go_on(callback: NoSpread, *steps: dict) -> NoSpread:
    for logged in steps:
        callback.on_train_batch_end(SimpleNamespace(callback_metrics=logged), None, None, None, 0)
    return callback


EQUAL = {"reward/zero_std_ratio": 1.0, "reward/group_std": 0.0, "train/grad_norm": 0.0}
FINE = {"reward/zero_std_ratio": 0.5, "reward/group_std": 0.1, "train/grad_norm": 1.0}


def test_equal_rewards_are_said_once_after_so_many_steps(capsys):
    callback = go_on(NoSpread(after_steps=4), *[EQUAL] * 3)
    assert capsys.readouterr().out == ""
    go_on(callback, *[EQUAL] * 5)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and "in 4 steps in a row the rewards of every group were equal" in said[0]


def test_what_varies_now_and_then_is_not_said(capsys):
    callback = go_on(NoSpread(after_steps=2), *[EQUAL, FINE] * 4)
    callback.on_train_end(None, None)
    assert capsys.readouterr().out == "" and not callback.warnings


@pytest.mark.parametrize(
    ("logged", "named"),
    [
        ({**FINE, "reward/gdino_group_std": 0.0}, "the reward's part gdino was equal within every group"),
        ({**FINE, "watch/oracle": 0.0}, "watch/oracle was 0 every time"),
        ({"train/grad_norm": 0.0}, "the gradient was 0"),
    ],
)
def test_a_part_a_watched_judge_and_a_gradient_are_said_too(logged, named, capsys):
    go_on(NoSpread(after_steps=3), *[logged] * 3)
    assert named in capsys.readouterr().out


def test_a_watched_judge_that_moves_says_nothing(capsys):
    go_on(NoSpread(after_steps=2), *[{**FINE, "watch/oracle": number / 10} for number in range(5)])
    assert capsys.readouterr().out == ""


def test_a_shorter_run_says_it_at_its_end(capsys):
    callback = go_on(NoSpread(after_steps=50), *[EQUAL] * 3)
    callback.on_train_end(None, None)
    assert "in 3 steps in a row" in capsys.readouterr().out
    trial = go_on(NoSpread(after_steps=50), *[EQUAL] * 2)
    trial.on_train_end(None, None)
    assert capsys.readouterr().out == ""


def test_a_resumed_run_counts_on(capsys):
    first, second = go_on(NoSpread(after_steps=4), *[EQUAL] * 3), NoSpread(after_steps=4)
    second.load_state_dict(first.state_dict())
    go_on(second, EQUAL, EQUAL)
    assert capsys.readouterr().out.count("in 4 steps in a row") == 1


def test_the_finding_of_the_run_ends_with_it():
    results = {"stages": {}, "steps": 5, "warnings": ["in 5 steps in a row nothing varied"]}
    assert headline(results).endswith("(evaluation.stages=[]). In 5 steps in a row nothing varied.")


class Constant(Reward):
    needs_images = False

    def __call__(self, rollout):
        return RewardOutput(torch.zeros(len(rollout), dtype=torch.float64))


def test_a_training_with_a_constant_reward_says_it(tmp_path, capsys):
    module = build(save_tiny_janus(tmp_path), reward=Constant(), kl_coef=0.0, plan=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[NoSpread(after_steps=3)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(PromptBatches(PROMPTS, 2, seed=0), batch_size=None))
    assert "in 3 steps in a row the rewards of every group were equal" in capsys.readouterr().out
