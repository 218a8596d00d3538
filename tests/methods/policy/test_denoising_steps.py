"""The skeleton of GRPO takes a policy that is no sequence of tokens: the steps of a sampler, as Flow-GRPO has them."""

import copy
import math
from dataclasses import dataclass
from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.pixels import to_bytes
from t2i_rl.core.seeding import row_normals
from t2i_rl.data.prompts import PromptBatches
from t2i_rl.methods.policy.base import Actions, PolicyMethod
from t2i_rl.methods.trainable import select_trainable
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.text_encoders import TextEncoding
from tests.support.small_diffusers import pipeline
from tests.support.tiny import PROMPTS
from tests.support.training import Keep, gradients_of, quiet_trainer

TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)
STEPS = range(len(TIMES) - 1)
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]}


@dataclass(kw_only=True)
class Denoised(Drawn):
    """Latents `(B, 1 + S, C, h, w)` from noise to picture, and the log-probs `(B, S)` that were seen on the way."""

    path: torch.Tensor
    seen_logprobs: torch.Tensor
    text: TextEncoding


class DenoisingSteps(PolicyMethod):
    """Each step of the SDE of a rectified flow is an action: the latents that it goes to (arXiv 2505.05470, eq. 9)."""

    trains = frozenset({"diffusion"})
    keeps_as = "denoising_steps"

    def __init__(self, model: SD3, reward: Reward, optimizer: partial, noise: float = 0.7, **options):
        select_trainable(model.requires_grad_(False).denoiser, [r"transformer_blocks\."], LORA)
        super().__init__(model, reward, optimizer, loss_weights={"step": 1.0}, **options)
        self.model, self.noise = model, noise

    def roll_out(self, batch):
        prompts, seeds = self.rows(batch)
        text = self.model.encode_prompts([prompt.text for prompt in prompts])
        normals = row_normals(seeds, (len(TIMES), *self.model.latent_shape)).to(text.embeds)
        path, logprobs = [normals[:, 0]], []
        for step in STEPS:
            mean, deviation = self.transition(path[-1], step, text)
            path.append(mean + deviation * normals[:, step + 1])
            logprobs.append(log_density(path[-1], mean, deviation))
        return Denoised(
            prompts=prompts,
            seeds=seeds,
            group_size=self.group_size,
            images=to_bytes(self.model.decode_latents(path[-1]), centred=True),
            path=torch.stack(path, dim=1),
            seen_logprobs=torch.stack(logprobs, dim=1),
            text=text,
        )

    def logprobs(self, rollout: Denoised, part: slice, model: SD3) -> Actions:
        rows = rollout.rows(part)
        logprobs = torch.stack(
            [
                log_density(rows.path[:, step + 1], *self.transition(rows.path[:, step], step, rows.text))
                for step in STEPS
            ],
            dim=1,
        )
        owner = torch.arange(len(rollout))[part]
        return Actions(logprobs, torch.ones_like(logprobs, dtype=torch.bool), owner, {"step": slice(None)})

    def transition(self, x: torch.Tensor, step: int, text: TextEncoding) -> tuple[torch.Tensor, float]:
        """Mean and deviation of the next latents."""
        t, dt = TIMES[step], TIMES[step + 1] - TIMES[step]
        sigma = self.noise * math.sqrt(t / (1 - min(t, TIMES[1])))  # infinite at 1; the released code does the same
        drift = velocity(self.model.denoiser, x, t, text)
        drift = drift + sigma**2 / (2 * t) * (x + (1 - t) * drift)
        return x + drift * dt, sigma * math.sqrt(-dt)


def velocity(denoiser, x: torch.Tensor, t: float, text: TextEncoding) -> torch.Tensor:
    times = torch.full((len(x),), 1000 * t, dtype=x.dtype)
    texts = {"encoder_hidden_states": text.embeds, "pooled_projections": text.pooled}
    return denoiser(hidden_states=x, timestep=times, **texts, return_dict=False)[0]


def log_density(x: torch.Tensor, mean: torch.Tensor, deviation: float) -> torch.Tensor:
    """A mean over the elements of a latent, as in the released code."""
    normal = torch.distributions.Normal(mean, deviation)
    return normal.log_prob(x).mean(dim=(1, 2, 3))


class Brightness(Reward):
    def __call__(self, drawn):
        return RewardOutput(torch.tensor([float(image.mean()) / 255 for image in drawn.images], dtype=torch.float64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(pipeline("sd3", tmp_path_factory.mktemp("sd3") / "model"))


def build(folder: str, optimizer: partial | None = None, **options) -> DenoisingSteps:
    settings = {"group_size": 3, "micro_batch_size": 4, "max_grad_norm": None, **options}
    model, optimizer = SD3(folder, max_sequence_length=2), optimizer or partial(torch.optim.SGD, lr=1.0)
    module, draws = DenoisingSteps(model, Brightness(), optimizer, **settings), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in module.learning():  # away from the reference: adapters start as zeros
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return module


def fit(module: DenoisingSteps, steps: int) -> L.Trainer:
    trainer = quiet_trainer(steps)
    trainer.fit(module, DataLoader(PromptBatches(PROMPTS[:2], 2, seed=0), batch_size=None))
    return trainer


def test_steps_are_scored_as_they_were_drawn(folder):
    module = build(folder)
    with torch.no_grad():
        rollout = module.roll_out(list(enumerate(PROMPTS[:2])))
    old = torch.cat([actions.logprobs for actions in module.score(rollout, module.passes(rollout))])
    torch.testing.assert_close(old, rollout.seen_logprobs, rtol=1e-4, atol=1e-5)
    measured = fit(module, 1).callback_metrics
    assert float(measured["train/ratio_max"]) == 1 and float(measured["step/kl"]) > 0


def test_the_gradient_is_that_of_the_written_objective_in_float64(folder):
    module, rollouts = build(folder, partial(Keep, lr=1.0), kl_coef=2.0), []
    roll_out = module.roll_out
    module.roll_out = lambda batch: rollouts.append(roll_out(batch)) or rollouts[0]
    gradients = gradients_of(module, fit(module.double(), 1))
    rollout, denoiser = rollouts[0], module.model.denoiser
    rewards = torch.tensor([float(image.mean()) / 255 for image in rollout.images], dtype=torch.float64).view(2, 3)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    frozen = copy.deepcopy(denoiser)
    for layer in frozen.modules():
        if hasattr(layer, "lora_A"):
            layer.enable_adapters(False)
    objective = 0.0
    for row, advantage in enumerate(advantages):
        for step, (t, after) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
            x, dt, sigma2 = rollout.path[row, step][None], after - t, 0.49 * t / (1 - min(t, 0.75))
            logprobs = []
            for model in (denoiser, frozen):
                v = velocity(model, x, t, rollout.text[row : row + 1])
                mean = x + (v + sigma2 / (2 * t) * (x + (1 - t) * v)) * dt
                square = (rollout.path[row, step + 1] - mean).square() / (sigma2 * -dt)
                logprobs.append(-0.5 * (square + math.log(2 * math.pi * sigma2 * -dt)).mean())
            d = logprobs[1].detach() - logprobs[0]
            objective = objective - advantage * (logprobs[0] - logprobs[0].detach()).exp() + 2.0 * (d.exp() - d - 1)
    expected = torch.autograd.grad(objective / (6 * len(STEPS)), [value for _, value in module.learning()])
    assert max(float(value.abs().max()) for value in expected) > 1e-4
    for value, other in zip(gradients.values(), expected, strict=True):
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-10)


def test_adapters_learn_and_nothing_else_does(folder):
    module = build(folder)
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    assert fit(module, 2).global_step == 2 and module.rollouts_done == 2
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name, _ in module.learning()} and all("lora_" in name for name in moved)


def test_the_clip_binds_at_the_second_update_of_a_rollout(folder):
    adam = partial(torch.optim.AdamW, lr=1e-2)
    modules = [build(folder, adam, updates_per_rollout=updates, clip_range=1e-4) for updates in (1, 2)]
    once, twice = (fit(module, module.updates_per_rollout).callback_metrics for module in modules)
    assert float(once["train/clip_fraction"]) == 0 and float(twice["train/clip_fraction"]) > 0.25
    assert modules[1].rollouts_done == 1
