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
from t2i_rl.methods.irg.policy import TrajectoryGRPO, actions
from t2i_rl.methods.irg.rounds import Interleave
from t2i_rl.methods.irg.training import IRG
from t2i_rl.methods.irg.trajectory import MODES
from t2i_rl.models.autoregressive.interleaved import NO_LABEL
from t2i_rl.models.autoregressive.segments import BOTH
from tests.support.tiny import PROMPTS, load_tiny_janus, save_tiny_janus


class Brightness(Reward):
    """Reads pictures alone."""

    def __call__(self, rollout):
        return RewardOutput(torch.tensor([float(image.mean()) / 255 for image in rollout.images], dtype=torch.float64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def method(folder: str, **options) -> TrajectoryGRPO:
    loop = Interleave(
        guidance_scale=1.0, reflection_scale=1.0, image_scale=1.0, text_temperature=1.0, max_tokens=10, retries=0
    )
    settings = {"group_size": 3, "optimizer": partial(torch.optim.SGD, lr=1.0), "max_grad_norm": 1e9, "kl_coef": 0.1, "tokens_per_pass": 900, "interleave": loop}  # fmt: skip
    return TrajectoryGRPO(load_tiny_janus(folder), Brightness(), **settings | options)


class TwoPrompts(PromptData):
    def __init__(self):
        L.LightningDataModule.__init__(self)
        self.prompts, self.batch_size, self.seed = PROMPTS, 2, 0


def fit(module, steps: int, ranks: int = 1) -> TrajectoryGRPO:
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp_spawn" if ranks > 1 else "auto", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, TwoPrompts())
    return module


def test_each_round_is_a_conversation_of_its_mode(folder):
    module = method(folder)
    drawn = module.roll_out([(0, PROMPTS[0])])[0]
    drawn.text_tokens = [len(text.drawn_as) + ends for text, ends in zip(drawn.segments[1::2], (True, False), strict=True)]  # fmt: skip
    first, second = actions(drawn, module.interleave.seen)
    for segments, mode in ((first, "initial_full_learning"), (second, "improving_full_learning")):
        assert [each.role for each in segments] == [part.role for part in MODES[mode]]
    assert [each.loss for each in first] == [False, True, True]
    assert [each.loss for each in second] == [False, False, False, False, True]  # the reflection did not end
    assert second[2].seen_by == BOTH and second[2].drawn_as is None and second[4].drawn_as is not None


@pytest.mark.parametrize("rounds, policy", [(2, "append"), (3, "window")])
@torch.no_grad()
def test_actions_are_scored_as_they_were_sampled(folder, rounds, policy):
    """Without guidance the sampler's own log-probs are the conditional's; the codes are those sampled, not those that the picture is read as."""
    module = method(folder)
    module.interleave = replace(module.interleave, rounds=rounds, policy=policy)
    inter, noted = module.interleaved, []
    sample = inter.sample

    def watched(*given):
        noted.append(sample(*given))
        return noted[-1]

    inter.sample = watched
    drawn = module.roll_out([(0, PROMPTS[0]), (1, PROMPTS[1])])
    conversations = [each for row in drawn for each in actions(row, module.interleave.seen)]
    scored = module.scores(conversations)
    for number, each in enumerate(scored):
        decoded = noted[number % rounds]
        torch.testing.assert_close(each["image"], decoded.logprobs[number // rounds], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_texts_are_read_and_scored_in_the_tokens_that_they_were_written_in(folder):
    """Written greedily, every token is the likeliest one by a plain forward over what went before, even where the words would give other tokens back."""
    module = method(folder)
    module.interleave = replace(module.interleave, text_temperature=0)
    inter = module.interleaved
    write = inter.write
    inter.write = lambda *given: [replace(found, text="words of another tokenizer") for found in write(*given)]
    drawn = module.roll_out([(0, PROMPTS[0]), (1, PROMPTS[1])])
    for row in drawn:
        row.text_tokens = [len(text.drawn_as) + 1 for text in row.segments[1::2]]
        for segments in actions(row, module.interleave.seen):
            laid, text = inter.lay_out(segments), segments[-2]
            labelled = (laid.text != NO_LABEL).nonzero().flatten()
            assert laid.text[labelled].tolist() == [*text.drawn_as, inter.special["eos"]]
            hidden = inter.model.model.language_model(inputs_embeds=laid.embeds[None], use_cache=False).last_hidden_state[0]  # fmt: skip
            logits = inter.model.lm_head(hidden[labelled[:-1]])
            assert len(text.drawn_as) > 3 and logits.argmax(dim=-1).tolist() == text.drawn_as
            scored = module.scores([segments])[0]["text"][:-1]
            torch.testing.assert_close(scored, logits.log_softmax(dim=-1).max(dim=-1).values, rtol=1e-4, atol=1e-4)


def test_an_end_at_once_is_an_action_and_a_step_without_any_moves_nothing(folder):
    module = method(folder, image_loss_weight=0.0)
    inter, write = module.interleaved, module.interleaved.write
    inter.write = lambda *given: [replace(found, text="", drawn_as=[], tokens=1) for found in write(*given)]
    for segments in actions(module.roll_out([(0, PROMPTS[0])])[0], module.interleave.seen):
        assert len(module.scores([segments])[0]["text"]) == 1
    inter.write = lambda *given: [replace(found, finished=False, tokens=len(found.drawn_as)) for found in write(*given)]
    start = {name: value.detach().clone() for name, value in module.learning()}
    fit(module, 1)
    assert all(torch.equal(value, start[name]) for name, value in module.learning())


def test_one_update_follows_the_gradient_of_the_written_objective(folder):
    ours, theirs = method(folder), method(folder)
    start = {name: value.detach().clone() for name, value in theirs.learning()}
    theirs.interleaved.prepare()
    prompts = [PROMPTS[0], PROMPTS[1]]
    order = [index for index, _ in next(iter(_batches()))]
    batch = [(index, PROMPTS[index]) for index in order]
    assert len(batch) == len(prompts)
    drawn = theirs.roll_out(batch)
    rewards = np.array([float(row.images[-1].mean()) / 255 for row in drawn]).reshape(2, 3)
    advantages = ((rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True, ddof=1) + 1e-4)).flatten()
    total, count = 0.0, 0
    for row, advantage in zip(drawn, advantages, strict=True):
        for segments in actions(row, theirs.interleave.seen):
            scored, _ = theirs.interleaved([[segments]])
            for logprobs, _ in scored.values():
                total = (
                    total - (logprobs - logprobs.detach()).exp().mul(advantage).sum()
                )  # the ratio is one; the KL's gradient there is zero
                count += len(logprobs)
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
    drawn = module.roll_out([(0, PROMPTS[0])])
    rewards, _ = module.judged(drawn, [PROMPTS[0]] * 3)
    for row, reward, first, last in zip(drawn, rewards["total"], rewards["first"], rewards["last"], strict=True):
        assert (
            reward == last - first
            and first == float(row.images[0].mean()) / 255
            and last == float(row.images[1].mean()) / 255
        )


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
        module.judged(module.roll_out([(0, PROMPTS[0])]), [PROMPTS[0]] * 3)


def test_what_has_not_learnt_to_reflect_is_said(folder, capsys):
    fit(method(folder), 1)
    assert "no method.start_from: training begins at" in capsys.readouterr().out


def test_options_that_cannot_train_are_refused(folder):
    loop = {"text_temperature": 1.0, "image_temperature": 1.0}
    options = {"group_size": 2, "updates_per_rollout": 1, "kl_coef": 0, "reward_on": "gain"}
    with pytest.raises(UserError, match="rounds=2"):
        TrajectoryGRPO.check(options | {"interleave": Interleave(rounds=1, **loop)})
    with pytest.raises(UserError, match="retries must be 0"):
        TrajectoryGRPO.check(options | {"interleave": Interleave(**loop)})


def test_it_starts_from_a_run_of_irg_and_holds_on_to_it_with_adapters_too(folder, tmp_path):
    """The KL of an adapter that has not moved is taken to where training starts, not to the model on the disk."""
    first = IRG(load_tiny_janus(folder), Interleave(), partial(torch.optim.SGD, lr=0.1))
    with torch.no_grad():
        for _, value in first.learning():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    first.average = {name: value.detach().clone() for name, value in first.learning()}
    first.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    checkpoint = {"state_dict": first.state_dict(), "global_step": 1}
    first.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "irg.ckpt")
    drawn = method(folder).roll_out([(0, PROMPTS[0])])
    for lora in (None, {"r": 2}):
        module = method(folder, start_from=str(tmp_path / "irg.ckpt"), lora=lora)
        conversations = [each for row in drawn for each in actions(row, module.interleave.seen)]
        mine, base = module.scores(conversations), method(folder).scores(conversations)
        with module.reference.scoring(module.model) as frozen:
            held = module.scores(conversations, frozen if frozen is not module.model else None)
        for now, then, raw in zip(mine, held, base, strict=True):
            torch.testing.assert_close(now["image"], then["image"])
            assert (now["image"] - raw["image"]).abs().max() > 1e-3
    checkpoint["irg"]["average"] = {"interleaved.janus.model.lora_A.weight": torch.zeros(1)}
    torch.save(checkpoint, tmp_path / "lora.ckpt")
    with pytest.raises(UserError, match="trained with adapters"):
        method(folder, start_from=str(tmp_path / "lora.ckpt"))
