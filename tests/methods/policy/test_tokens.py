"""The GRPO module on a random Janus: invariants before the first update, what learns and what must not, and its
gradient."""

import copy
from functools import partial

import lightning as L
import pytest
import torch

from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.data.prompts import PromptBatches
from t2i_rl.methods.policy.loss import group_advantages
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.rewards.random import Random
from t2i_rl.rewards.self_certainty import SelfCertainty
from tests.support.tiny import PROMPTS, load_tiny_janus, save_tiny_janus, tiny_rollout
from tests.support.training import Keep, gradients_of, quiet_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def build(folder, reward=None, janus: dict | None = None, **settings) -> GRPO:
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
    settings = {"group_size": 3, "micro_batch_size": 4, "optimizer": optimizer, "kl_coef": 0.1, **settings}
    return GRPO(load_tiny_janus(folder, **(janus or {})), reward or SelfCertainty(), **settings)


def train(module: GRPO, steps: int, prompts=PROMPTS, batch_size=2) -> L.Trainer:
    trainer = quiet_trainer(steps)
    stream = torch.utils.data.DataLoader(PromptBatches(prompts, batch_size, seed=0), batch_size=None)
    trainer.fit(module, stream)
    return trainer


def gradient(folder, **settings) -> tuple[GRPO, dict[str, torch.Tensor]]:
    """A module and the gradient of its first update, on two prompts."""
    module = build(folder, optimizer=partial(Keep, lr=1.0), max_grad_norm=1e9, **settings)
    return module, gradients_of(module, train(module, 1, prompts=PROMPTS[:2]))


def scored(module: GRPO, rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs `(B, T + N)` under the policy, which the rollout then has the statistics of, and the reference."""
    passes = module.passes(rollout)
    old = torch.cat([actions.logprobs for actions in module.score(rollout, passes)])
    return old, torch.cat(module.score_reference(rollout, passes))


@pytest.mark.parametrize("logprob", ["conditional", "guided", "guided_detach_uncond"])
def test_before_the_first_update_the_ratio_is_one_and_the_kl_is_zero(folder, logprob):
    module = build(folder, logprob=logprob)
    rollout = tiny_rollout(module)
    old, reference = scored(module, rollout)
    for part in module.passes(rollout):
        now = module.logprobs(rollout, part, module.model)
        assert now.logprobs.requires_grad and torch.equal(now.logprobs, old[part])
        assert torch.equal(now.logprobs, reference[part])
    both = torch.cat([rollout.text_stats.logprobs, rollout.image_stats.logprobs], dim=1)
    assert torch.equal(both, old)


def test_guided_logprobs_are_those_the_tokens_were_drawn_with(folder):
    module = build(folder, logprob="guided")
    rollout = tiny_rollout(module)
    scored(module, rollout)
    torch.testing.assert_close(rollout.image_stats.logprobs, rollout.drawn.logprobs, rtol=1e-4, atol=1e-4)


def test_rollouts_are_drawn_with_the_newest_weights(folder):
    """The log-probs seen while drawing are those of the policy after its updates, not of the one that drew before."""
    module = build(folder, logprob="guided")
    before = tiny_rollout(module)
    train(module, steps=3)
    rollout = tiny_rollout(module)
    scored(module, rollout)
    torch.testing.assert_close(rollout.image_stats.logprobs, rollout.drawn.logprobs, rtol=1e-4, atol=1e-4)
    scored(module, before)
    assert (before.image_stats.logprobs - before.drawn.logprobs).abs().max() > 0.01


def test_the_reference_does_not_move_and_the_policy_does(folder):
    module = build(folder)
    before = copy.deepcopy(module.reference.twin.state_dict())
    start = {name: value.clone() for name, value in module.model.model.state_dict().items()}
    train(module, steps=10)
    for name, value in module.reference.twin.state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = {name for name, value in module.model.model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved and all(name.startswith(("model.language_model.", "lm_head.")) for name in moved)


def test_lora_trains_adapters_only_and_its_reference_is_the_base(folder):
    module = build(folder, lora={"r": 4, "lora_alpha": 8})
    base = load_tiny_janus(folder)
    train(module, steps=3)
    learning = [name for name, _ in module.learning()]
    assert learning and all("lora_" in name for name in learning)
    rollout = tiny_rollout(module)
    _, reference = scored(module, rollout)
    text, image = module.stats(rollout, base)
    torch.testing.assert_close(reference, torch.cat([text.logprobs, image.logprobs], dim=1), rtol=1e-5, atol=1e-5)
    assert (rollout.image_stats.logprobs - image.logprobs).abs().max() > 1e-4


@pytest.mark.parametrize("loss_reduction", ["token", "sequence", "prompt"])
def test_the_micro_batch_size_changes_no_gradient(folder, loss_reduction):
    (_, whole), (_, split) = (
        gradient(folder, micro_batch_size=size, loss_reduction=loss_reduction) for size in (64, 2)
    )
    assert whole.keys() == split.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(folder):
    saved = {}

    def measure(checkpointing: bool) -> dict:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            _, gradients = gradient(folder, gradient_checkpointing=checkpointing)
        saved[checkpointing] = sum(sizes)
        return gradients

    plain, again = measure(False), measure(True)
    assert saved[True] < 0.7 * saved[False]
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-4, atol=1e-7)


def test_half_precision_weights_are_not_trained_but_adapters_on_them_are(folder):
    base = load_tiny_janus(folder, dtype="bfloat16")
    with pytest.raises(UserError, match="bf16-mixed"):
        GRPO(base, SelfCertainty(), optimizer=partial(torch.optim.SGD, lr=1.0))
    module, gradients = gradient(folder, lora={"r": 4}, janus={"dtype": "bfloat16"})
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert learning and {parameter.dtype for parameter in learning} == {torch.float32}
    assert gradients and all(torch.isfinite(value).all() for value in gradients.values())


def test_a_reward_computes_in_its_own_dtype_where_training_has_autocast_on(folder):
    class Product(Reward):
        needs_images = False

        def __call__(self, rollout):
            a = torch.full((len(rollout), 1), 1.001)
            return RewardOutput((a @ a[:1].T).flatten())

    module = build(folder, reward=Product())
    rollout = tiny_rollout(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = module.ask_rewards(rollout)[0].total
    assert torch.allclose(total.double(), torch.tensor(1.001**2, dtype=torch.float64), atol=1e-5)


def test_a_reward_that_reads_another_distribution_than_is_trained_gets_it_and_a_watched_one_too(folder):
    class Guided(Reward):
        needs_images = False

        def __init__(self, distribution):
            self.distribution = distribution

        def __call__(self, rollout):
            return RewardOutput(rollout.image_stats.logprobs.double().mean(dim=1))

    guided, conditional = Guided("guided"), Guided("conditional")
    module = build(folder, reward=guided, watch={"same": guided, "trained": conditional})
    rollout = tiny_rollout(module)
    scored(module, rollout)
    reward, watched = module.ask_rewards(rollout)
    torch.testing.assert_close(reward.total, rollout.drawn.logprobs.double().mean(dim=1), rtol=1e-4, atol=1e-4)
    assert torch.equal(watched["same"].total, reward.total)
    assert torch.equal(watched["trained"].total, rollout.image_stats.logprobs.double().mean(dim=1))
    assert (watched["trained"].total - reward.total).abs().max() > 0.01


def test_an_offloaded_reference_scores_the_same(folder):
    stays, offloaded = build(folder), build(folder, offload_reference=True)
    rollout = tiny_rollout(stays)
    torch.testing.assert_close(scored(stays, rollout)[1], scored(offloaded, rollout)[1], rtol=0, atol=0)


@pytest.mark.parametrize(("loss_reduction", "rows"), [("token", 6), ("prompt", 3), ("sequence", 1)])
def test_the_gradient_is_that_of_the_written_objective(folder, loss_reduction, rows):
    """Against the loss written out anew, for a policy that has left its reference: -A exp(logp - old) + beta k3, a mean
    over the live tokens of so many rows, and the mean of these."""
    settings = {"micro_batch_size": 64, "kl_coef": 2.0, "loss_reduction": loss_reduction}
    module = build(folder, optimizer=partial(Keep, lr=1.0), max_grad_norm=1e9, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.requires_grad)
    rollouts, roll_out = [], module.roll_out
    module.roll_out = lambda batch: rollouts.append(roll_out(batch)) or rollouts[0]
    ours = gradients_of(module, train(module, 1, prompts=PROMPTS[:2]))
    advantages = group_advantages(SelfCertainty()(rollouts[0]).total, 3)

    def logprobs(model):
        text, image = module.stats(rollouts[0], model)
        return torch.cat([text.logprobs, image.logprobs], 1), torch.cat([text.mask, image.mask], 1)

    logp, mask = logprobs(module.model)
    d = logprobs(load_tiny_janus(folder))[0].detach() - logp
    kl = torch.exp(d) - d - 1
    assert float((kl * mask).sum() / mask.sum()) > 0.01
    losses = (-advantages[:, None] * torch.exp(logp - logp.detach()) + 2.0 * kl) * mask
    loss = (losses.sum(1).view(-1, rows).sum(1) / mask.sum(1).view(-1, rows).sum(1)).mean()
    expected = torch.autograd.grad(loss, [value for _, value in module.learning()])
    for value, other in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-6)


def test_a_modality_of_weight_zero_has_no_part_in_the_gradient(folder):
    """Plans alone, images alone: the two gradients, each times its share of the tokens, add up to that of both."""
    (_, whole), (_, text), (_, image) = (
        gradient(folder, kl_coef=0.0, **weights) for weights in ({}, {"image_loss_weight": 0}, {"text_loss_weight": 0})
    )
    rollout = tiny_rollout(build(folder))
    counts = [float(rollout.plan_token_mask.sum()), float(rollout.image_tokens.numel())]
    assert not any("lm_head" in name for name in image)
    for name, value in whole.items():
        shares = [part[name] * count / sum(counts) for part, count in zip((text, image), counts) if name in part]
        torch.testing.assert_close(sum(shares), value, rtol=1e-3, atol=1e-6)


def test_the_clip_can_bind_with_several_updates_per_rollout(folder):
    module = build(folder, updates_per_rollout=4, clip_range=0.01, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    trainer = train(module, steps=4)
    assert trainer.callback_metrics["train/clip_fraction"] > 0.05
    assert module.rollouts_done == 1 and trainer.global_step == 4
    once = build(folder)
    assert train(once, steps=1).callback_metrics["train/clip_fraction"] == 0


def test_a_reward_that_is_not_a_number_stops_the_run(folder):
    class Broken(Random):
        def __call__(self, rollout):
            output = super().__call__(rollout)
            output.total[1] = float("nan")
            return output

    with pytest.raises(UserError, match="not finite in 1 of 6 rows"):
        train(build(folder, reward=Broken()), steps=1)


def test_a_rollout_is_a_function_of_seed_step_and_prompt_not_of_its_batch(folder):
    module = build(folder)
    both = module.roll_out(list(enumerate(PROMPTS)))
    alone = module.roll_out([(1, PROMPTS[1])])
    assert torch.equal(both.image_tokens[3:6], alone.image_tokens) and both.plans[3:6] == alone.plans
    assert len({tuple(row) for row in both.image_tokens.tolist()}) == len(both)


def test_without_plans_nothing_textual_is_trained(folder):
    module = build(folder, plan=False)
    train(module, steps=2)
    assert not any(p.requires_grad for name, p in module.named_parameters() if "lm_head" in name)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"logprob": "x"}, "conditional, guided"),
        ({"loss_reduction": "x"}, "token, sequence"),
        ({"group_size": 1}, "2 or more"),
        ({"text_loss_weight": 0, "image_loss_weight": 0}, "nothing would be trained"),
        ({"trainable": ["nothing"]}, "nothing"),
    ],
)
def test_options_outside_their_choices_are_refused_in_one_line(folder, settings, named):
    with pytest.raises(UserError, match=named) as error:
        build(folder, **settings)
    assert "\n" not in str(error.value)


def test_nsc_reward_by_hand_and_its_sign(folder):
    module = build(folder)
    rollout = tiny_rollout(module)
    scored(module, rollout)
    text, image = rollout.text_stats, rollout.image_stats
    by_hand = [
        -(text.self_certainty[i][text.mask[i]].double().mean() + image.self_certainty[i].double().mean()).item()
        for i in range(6)
    ]
    torch.testing.assert_close(SelfCertainty()(rollout).total, torch.tensor(by_hand, dtype=torch.float64))
    assert (SelfCertainty()(rollout).total < 0).all() and (SelfCertainty(1, 1)(rollout).total > 0).all()
    image.self_certainty.zero_()
    text.self_certainty.zero_()
    assert (SelfCertainty()(rollout).total == 0).all()


def test_the_sum_is_a_brevity_reward_and_the_means_are_not(folder):
    """Every token equally certain: the sum falls with each further plan token, the means do not move."""
    module = build(folder)
    rollout = tiny_rollout(module)
    scored(module, rollout)
    for stats in (rollout.text_stats, rollout.image_stats):
        stats.self_certainty = stats.mask.float()
    lengths = rollout.text_stats.mask.sum(-1).double()
    torch.testing.assert_close(SelfCertainty(aggregation="sum")(rollout).total, -(lengths + 64))
    assert SelfCertainty(aggregation="modality_mean")(rollout).total.unique().tolist() == [-2]
    assert SelfCertainty(aggregation="token_mean")(rollout).total.std() < 1e-9
