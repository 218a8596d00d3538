"""What becomes of a step whose gradient is not finite: one line that names the way past, or a step left out and
counted."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from t2i_rl.command.resume import COMPARED, _newest_run
from t2i_rl.core.errors import UserError
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.irg.training import IRG
from t2i_rl.methods.pairs.base import PairMethod
from t2i_rl.methods.step import NonFinite
from tests.methods.policy.test_tokens import build, train
from tests.support.commands import composed
from tests.support.tiny import save_tiny_janus

NAN, FINE = torch.tensor(float("nan")), torch.tensor(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def broken_at(module, *numbers: int):
    """The module, with gradients that are NaN in the updates of these numbers."""
    backward, count = module.manual_backward, iter(range(1000))

    def poisoned(loss):
        backward(loss * (float("nan") if next(count) in numbers else 1.0))

    module.manual_backward = poisoned
    return module


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_run_ends_in_one_line_that_names_the_way_past(folder):
    module = broken_at(build(folder, micro_batch_size=64), 0)
    before = weights(module)
    with pytest.raises(UserError) as error:
        train(module, steps=1)
    said = str(error.value)
    assert "nan at optimizer step 0" in said and "method.on_nonfinite=skip" in said and "\n" not in said
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_step_is_left_out_and_counted_and_training_goes_on(folder):
    module = broken_at(build(folder, micro_batch_size=64, on_nonfinite="skip"), 0)
    before = weights(module)
    trainer = train(module, steps=1)
    assert trainer.global_step == 1 and module.rollouts_done == 2 and module.nonfinite.skipped == 1
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_what_weighs_nothing_may_be_infinite(folder):
    """Image tokens that the reference would never draw, while plans alone are trained."""
    module = build(folder, image_loss_weight=0.0)
    score_reference = module.score_reference

    def impossible(rollout, passes):
        reference = score_reference(rollout, passes)
        for logprobs in reference:
            logprobs[:, -rollout.image_tokens.shape[1] :] = float("-inf")
        return reference

    module.score_reference = impossible
    measured = train(module, steps=1).callback_metrics
    assert torch.isfinite(measured["train/loss"]) and 0 < measured["train/grad_norm"] < float("inf")
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_the_count_is_in_the_checkpoint(folder):
    module, other, checkpoint = build(folder), build(folder), {}
    module.nonfinite.skipped = 3
    checkpoint["state_dict"] = module.state_dict()
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert other.nonfinite.skipped == 3
    del checkpoint["grpo"]["skipped"]  # one of before
    other.on_load_checkpoint(checkpoint)
    assert other.nonfinite.skipped == 0


def test_ten_broken_steps_in_a_row_end_the_run():
    steps = NonFinite("skip")
    for number in range(9):
        assert not steps.allows(NAN, number)
    assert steps.allows(FINE, 9)
    for number in range(9):
        assert not steps.allows(NAN, number)
    with pytest.raises(UserError, match="10 steps in a row"):
        steps.allows(NAN, 9)
    assert steps.skipped == 19


def test_one_broken_rank_decides_for_all(monkeypatch):
    """The other rank's decision comes in through the reduction."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda finite, op: finite.copy_(torch.minimum(finite, torch.tensor(0))))
    assert not NonFinite("skip").allows(FINE, 0)


@pytest.mark.parametrize("check", [IRG.check, PairMethod.check])
def test_other_choices_are_refused(check):
    options = {
        **dict.fromkeys(("text_loss_weight", "image_loss_weight"), 1.0),
        **dict.fromkeys(("judge", "start_from", "lora", "scheduler")),
        "interleave": Rounds(),
        "trainable": ["lm_head"],
        "optimizer": partial(torch.optim.SGD, lr=0.1),
    }
    check(options)
    with pytest.raises(UserError, match="method.on_nonfinite must be one of raise, skip, not 'ignore'"):
        check({**options, "on_nonfinite": "ignore"})


def test_a_run_goes_on_from_its_last_checkpoint_with_the_other_choice(tmp_path):
    run = tmp_path / "outputs" / "train" / "one"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    given = composed(f"paths.root_dir={tmp_path}", "method.on_nonfinite=skip")
    saved = {key: OmegaConf.to_container(given, resolve=True)[key] for key in COMPARED}
    del saved["method"]["on_nonfinite"]  # a run of before it could be chosen
    OmegaConf.save(OmegaConf.create(saved), run / "config.yaml")
    assert _newest_run(given) == run
