"""GRPO over trajectories: actions are scored as they were sampled, the gradient is the written one, ranks are one."""

from dataclasses import replace
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch

from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.data.prompts import PromptData
from t2i_rl.methods.irg.policy import TrajectoryGRPO, TrajectoryRollout, actions_of
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.irg.training import IRG
from t2i_rl.methods.irg.trajectory import MODES
from t2i_rl.models.autoregressive.interleaved import NO_LABEL
from t2i_rl.models.autoregressive.segments import BOTH
from tests.support.tiny import PROMPTS, load_tiny_janus, save_tiny_janus
from tests.support.training import quiet_trainer


class Brightness(Reward):
    """Reads pictures alone."""

    def __call__(self, rollout):
        return RewardOutput(torch.tensor([float(image.mean()) / 255 for image in rollout.images], dtype=torch.float64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def method(folder: str, **options) -> TrajectoryGRPO:
    loop = Rounds(
        guidance_scale=1.0, reflection_scale=1.0, image_scale=1.0, text_temperature=1.0, max_tokens=10, retries=0
    )
    settings = {
        "group_size": 3,
        "optimizer": partial(torch.optim.SGD, lr=1.0),
        "max_grad_norm": 1e9,
        "kl_coef": 0.1,
        "tokens_per_pass": 900,
        "interleave": loop,
    }
    return TrajectoryGRPO(load_tiny_janus(folder), Brightness(), **settings | options)


class TwoPrompts(PromptData):
    def __init__(self):
        L.LightningDataModule.__init__(self)
        self.prompts, self.batch_size, self.seed = PROMPTS, 2, 0


def fit(module, steps: int, ranks: int = 1) -> TrajectoryGRPO:
    quiet_trainer(steps, ranks).fit(module, TwoPrompts())
    return module


def roll_out(module, *numbers: int) -> TrajectoryRollout:
    with torch.no_grad():
        return module.roll_out([(number, PROMPTS[number]) for number in numbers])


def scored(module, conversations, model=None) -> list[dict[str, torch.Tensor]]:
    """Log-probs of the actions of each conversation, by kind, under a model or the policy."""
    rollout = TrajectoryRollout(
        prompts=[], seeds=[], trajectories=[], conversations=conversations, owner=list(range(len(conversations)))
    )
    logprobs = [{} for _ in conversations]
    with torch.no_grad():
        for part in module.passes(rollout):
            actions = module.logprobs(rollout, part, model or module.model)
            for kind, place in actions.kinds.items():
                for number in {number for row in part for number in row}:
                    chosen = actions.owner[place] == number
                    logprobs[number][kind] = actions.logprobs[place][chosen, 0]
    return logprobs


def test_each_round_is_a_conversation_of_its_mode(folder):
    module = method(folder)
    drawn = roll_out(module, 0).trajectories[0]
    texts = zip(drawn.segments[1::2], (True, False), strict=True)
    drawn.text_tokens = [len(text.drawn_as) + ends for text, ends in texts]
    first, second = actions_of(drawn, module.interleave.seen)
    for segments, mode in ((first, "initial_full_learning"), (second, "improving_full_learning")):
        assert [segment.role for segment in segments] == [part.role for part in MODES[mode]]
    assert [segment.loss for segment in first] == [False, True, True]
    assert [segment.loss for segment in second] == [False, False, False, False, True]  # the reflection did not end
    assert second[2].seen_by == BOTH and second[2].drawn_as is None and second[4].drawn_as is not None


@pytest.mark.parametrize("rounds, policy", [(2, "append"), (3, "window")])
def test_actions_are_scored_as_they_were_sampled(folder, rounds, policy):
    """Without guidance the sampler's own log-probs are the conditional's; the codes are those sampled, not those that
    the picture is read as."""
    module = method(folder)
    module.interleave = replace(module.interleave, rounds=rounds, policy=policy)
    inter, samples = module.interleaved, []
    sample = inter.sample

    def watched(*given):
        samples.append(sample(*given))
        return samples[-1]

    inter.sample = watched
    rollout = roll_out(module, 0, 1)
    assert len(rollout) == 6 and rollout.owner == [number for number in range(6) for _ in range(rounds)]
    for number, logprobs in enumerate(scored(module, rollout.conversations)):
        decoded = samples[number % rounds].logprobs[number // rounds]
        torch.testing.assert_close(logprobs["image"], decoded, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_texts_are_read_and_scored_in_the_tokens_that_they_were_written_in(folder):
    """Written greedily, every token is the likeliest one by a plain forward over what went before, even where the words
    would give other tokens back."""
    module = method(folder)
    module.interleave = replace(module.interleave, text_temperature=0)
    inter = module.interleaved
    write = inter.write
    inter.write = lambda *given: [replace(text, text="words of another tokenizer") for text in write(*given)]
    for row in roll_out(module, 0, 1).trajectories:
        row.text_tokens = [len(text.drawn_as) + 1 for text in row.segments[1::2]]
        for segments in actions_of(row, module.interleave.seen):
            laid, text = inter.lay_out(segments), segments[-2]
            labelled = (laid.text != NO_LABEL).nonzero().flatten()
            assert laid.text[labelled].tolist() == [*text.drawn_as, inter.special["eos"]]
            trunk = inter.model.model.language_model
            hidden = trunk(inputs_embeds=laid.embeds[None], use_cache=False).last_hidden_state[0]
            logits = inter.model.lm_head(hidden[labelled[:-1]])
            assert len(text.drawn_as) > 3 and logits.argmax(dim=-1).tolist() == text.drawn_as
            logprobs = scored(module, [segments])[0]["text"][:-1]
            torch.testing.assert_close(logprobs, logits.log_softmax(dim=-1).max(dim=-1).values, rtol=1e-4, atol=1e-4)


def test_an_end_at_once_is_an_action_and_a_step_without_any_moves_nothing(folder):
    module = method(folder, image_loss_weight=0.0)
    inter, write = module.interleaved, module.interleaved.write
    inter.write = lambda *given: [replace(text, text="", drawn_as=[], tokens=1) for text in write(*given)]
    for segments in actions_of(roll_out(module, 0).trajectories[0], module.interleave.seen):
        assert len(scored(module, [segments])[0]["text"]) == 1
    inter.write = lambda *given: [replace(text, finished=False, tokens=len(text.drawn_as)) for text in write(*given)]
    start = {name: value.detach().clone() for name, value in module.learning()}
    fit(module, 1)
    assert all(torch.equal(value, start[name]) for name, value in module.learning())


def test_one_update_follows_the_gradient_of_the_written_objective(folder):
    ours, theirs = method(folder), method(folder)
    start = {name: value.detach().clone() for name, value in theirs.learning()}
    rollout = roll_out(theirs, *[index for index, _ in next(iter(_batches()))])
    images = [row.images[-1] for row in rollout.trajectories]
    rewards = np.array([float(image.mean()) / 255 for image in images]).reshape(2, 3)
    advantages = ((rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True, ddof=1) + 1e-4)).flatten()
    total, count = 0.0, 0
    for row, advantage in zip(rollout.trajectories, advantages, strict=True):
        for segments in actions_of(row, theirs.interleave.seen):
            logprobs_by_kind, _ = theirs.interleaved([[segments]])
            for logprobs, _ in logprobs_by_kind.values():
                ratio = (logprobs - logprobs.detach()).exp()  # one; and the KL's gradient there is zero
                total, count = total - ratio.mul(advantage).sum(), count + len(logprobs)
    (total / count).backward()
    fit(ours, 1)
    grads = {name: value.grad for name, value in theirs.learning()}
    largest = max(float(grad.abs().max()) for grad in grads.values() if grad is not None)
    assert largest > 0
    for name, value in ours.learning():
        expected = torch.zeros_like(value) if grads[name] is None else grads[name]
        torch.testing.assert_close(start[name] - value.detach(), expected, rtol=2e-3, atol=2e-4 * largest)


def _batches():
    data = TwoPrompts()
    data.trainer = type("T", (), {"lightning_module": type("M", (), {"rollouts_done": 0})})
    return data.train_dataloader()


def test_the_gain_rewards_what_the_last_picture_adds(folder):
    module = method(folder, reward_on="gain")
    rollout = roll_out(module, 0)
    output = module.rewards(rollout)
    for number, row in enumerate(rollout.trajectories):
        first, last = (float(image.mean()) / 255 for image in row.images)
        assert output.total[number] == last - first
        assert output.parts["first"][number] == first and output.parts["last"][number] == last


@pytest.mark.slow
def test_two_ranks_train_as_one(folder):
    start = {name: value.detach().clone() for name, value in method(folder).learning()}
    one, two = (dict(fit(method(folder), 2, ranks).learning()) for ranks in (1, 2))
    change = max(float((one[name] - start[name]).detach().abs().max()) for name in one)
    assert change > 0
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4 * change)


def test_a_reward_that_is_no_number_stops(folder):
    class Broken(Brightness):
        def __call__(self, rollout):
            return RewardOutput(torch.full((len(rollout),), float("nan"), dtype=torch.float64))

    module = method(folder)
    module.reward = Broken()
    with pytest.raises(UserError, match="not finite"):
        module.ask_rewards(roll_out(module, 0))


def test_what_has_not_learnt_to_reflect_is_said(folder, capsys):
    fit(method(folder), 1)
    assert "no method.start_from: training begins at" in capsys.readouterr().out


def test_options_that_cannot_train_are_refused(folder):
    loop = {"text_temperature": 1.0, "image_temperature": 1.0}
    options = {"group_size": 2, "updates_per_rollout": 1, "kl_coef": 0, "reward_on": "gain"}
    with pytest.raises(UserError, match="rounds=2"):
        TrajectoryGRPO.check(options | {"interleave": Rounds(rounds=1, **loop)})
    with pytest.raises(UserError, match="retries must be 0"):
        TrajectoryGRPO.check(options | {"interleave": Rounds(**loop)})


def test_it_starts_from_a_run_of_irg_and_holds_on_to_it_with_adapters_too(folder, tmp_path):
    """The KL of an adapter that has not moved is taken to where training starts, not to the model on the disk."""
    first = IRG(load_tiny_janus(folder), Rounds(), partial(torch.optim.SGD, lr=0.1))
    with torch.no_grad():
        for _, value in first.learning():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    first.average = {name: value.detach().clone() for name, value in first.learning()}
    first.trainer = quiet_trainer(1)
    checkpoint = {"state_dict": first.state_dict(), "global_step": 1}
    first.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "irg.ckpt")
    conversations = roll_out(method(folder), 0).conversations
    for lora in (None, {"r": 2}):
        module = method(folder, start_from=str(tmp_path / "irg.ckpt"), lora=lora)
        mine, base = scored(module, conversations), scored(method(folder), conversations)
        with module.reference.scoring(module.model) as frozen:
            held = scored(module, conversations, frozen)
        for now, then, raw in zip(mine, held, base, strict=True):
            torch.testing.assert_close(now["image"], then["image"])
            assert (now["image"] - raw["image"]).abs().max() > 1e-3
    checkpoint["irg"]["average"] = {"interleaved.janus.model.lora_A.weight": torch.zeros(1)}
    torch.save(checkpoint, tmp_path / "lora.ckpt")
    with pytest.raises(UserError, match="trained with adapters"):
        method(folder, start_from=str(tmp_path / "lora.ckpt"))


def test_a_checkpoint_that_counted_updates_goes_on_at_its_rollout(folder):
    saved = {"batches_done": 6, "start_sha256": method(folder).start_sha256, "average": {}, "skipped": 1}
    module = method(folder, updates_per_rollout=2)
    module.take_own_state(saved)
    assert module.rollouts_done == 3 and module.nonfinite.skipped == 1
    other = method(folder, updates_per_rollout=2)
    other.take_own_state(module.own_state())
    assert other.rollouts_done == 3
    with pytest.raises(UserError, match=r"give the model \(and method.start_from\) that its run started from"):
        other.take_own_state(saved | {"start_sha256": "another's"})
