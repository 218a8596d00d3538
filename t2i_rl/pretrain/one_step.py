"""The last stage of flux_tiny: many guided steps distilled into one (DMD, arXiv 2311.18828).

Distribution matching goes with a regression onto the teacher's own pictures.
"""

import copy
from pathlib import Path

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save

from t2i_rl.core.files import write_atomic
from t2i_rl.core.finite import check_finite
from t2i_rl.core.progress import tracked
from t2i_rl.core.seeding import derive_seed
from t2i_rl.models.diffusion.base import LatentDiffusion, attention_for_training
from t2i_rl.pretrain.denoiser import muon_and_adamw
from t2i_rl.pretrain.streams import NumberedBatches
from t2i_rl.shapes.examples import TASK_WEIGHTS, sample_example


@torch.no_grad()
def guided_ode(
    model: LatentDiffusion, noise: torch.Tensor, captions: list[str], steps: int, guidance: float
) -> torch.Tensor:
    """Latents `(B, C, h, w)` that a flow-matching model draws from `noise` in guided Euler steps."""
    text, empty = model.encode_prompts(captions), model.encode_prompts([""] * len(captions))
    x, sigmas = noise.to(model.device), torch.linspace(1, 0, steps + 1)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        velocity = guided_velocity(model, x, torch.full((len(x),), 1000 * float(sigma)), text, empty, guidance)
        x = x + (following - sigma) * velocity
    return x


def guided_velocity(model: LatentDiffusion, x, t, text, empty, guidance: float) -> torch.Tensor:
    without = model.predict(x, t, empty, empty=True)
    return without + guidance * (model.predict(x, t, text, empty=False) - without)


def captions_of(seed: int, number: int, count: int) -> list[str]:
    """Batch `number` of training captions."""
    rng = np.random.default_rng((seed, 5, number))
    return [sample_example(rng, TASK_WEIGHTS)[0].text for _ in range(count)]


def noise_of(latent_shape: tuple[int, ...], seed: int, number: int, count: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(derive_seed(seed, "teacher", number))
    return torch.randn(count, *latent_shape, generator=draws)


def teach(
    model: LatentDiffusion,
    folder: Path,
    seed: int,
    precision: str,
    batches: int,
    batch_size: int,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """What the teacher draws, `(batches, batch_size, C, h, w)`; a file a batch, so that a killed run goes on.

    Raises:
        UserError: what it draws is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in tracked(range(batches), "the teacher draws", "batch"):
        file = folder / f"{number:04d}.safetensors"
        if not file.exists():
            noise = noise_of(model.latent_shape, seed, number, batch_size)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision.startswith("bf16")):
                drawn = guided_ode(model, noise, captions_of(seed, number, batch_size), steps, guidance).half()
            check_finite(drawn, "the latents that the teacher drew", "its own stage ran away; train it at a lower rate")
            write_atomic(file, save({"latents": drawn.cpu()}))
    return torch.stack(
        [load_file(folder / f"{number:04d}.safetensors")["latents"].float() for number in range(batches)]
    )


class TaughtPairs(NumberedBatches):
    """Batches `(captions, noise, latents)` of what the teacher drew, in turn."""

    def __init__(self, latent_shape: tuple[int, ...], taught: torch.Tensor, seed: int, first: int = 0):
        super().__init__(first)
        self.latent_shape, self.taught, self.seed = latent_shape, taught, seed

    def batch(self, number: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        turn, count = number % len(self.taught), self.taught.shape[1]
        noise = noise_of(self.latent_shape, self.seed, turn, count)
        return captions_of(self.seed, turn, count), noise, self.taught[turn]


class OneStepStage(L.LightningModule):
    """The student draws in one step from pure noise.

    A critic learns the flow of what the student draws, and critic minus guided teacher moves the
    student.

    Args:
        model: the taught model, which becomes the student; its text encoders and autoencoder stay
            as they are.
        guidance: the teacher's weight of classifier-free guidance.
        regression: weight of the squared error to the teacher's picture beside distribution
            matching.
        alone: steps at the start with the regression alone, while the critic learns.
    """

    optimizer_count = 4  # Lightning counts a step for each

    def __init__(
        self,
        model: LatentDiffusion,
        seed: int,
        guidance: float,
        regression: float = 1.0,
        alone: int = 300,
        lr: float = 5e-4,
        muon_lr: float = 5e-4,
        cooldown: float = 0.5,
        warmup: int = 50,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.seed, self.guidance, self.regression, self.alone = seed, guidance, regression, alone
        self.lr, self.muon_lr, self.cooldown, self.warmup = lr, muon_lr, cooldown, warmup
        self.model = model.eval().requires_grad_(False)
        self.teacher, self.critic = copy.deepcopy(model), copy.deepcopy(model)
        for part in (self.model, self.critic):
            part.denoiser.train().requires_grad_(True)

    def training_step(self, batch: tuple[list[str], torch.Tensor, torch.Tensor], index: int) -> None:
        captions, noise, taught = batch
        step = self.global_step // self.optimizer_count
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "one step", step))
        with torch.no_grad():
            text, empty = (self.teacher.encode_prompts(words) for words in (captions, [""] * len(captions)))
        with attention_for_training(self.model):
            x = noise - self.model.predict(noise, torch.full((len(noise),), 1000.0, device=self.device), text)
            error = (x - taught).square().mean()
            direction = self._direction(x.detach(), text, empty, draws)
            matching = (x * direction).mean() if step >= self.alone else 0.0
            self.manual_backward(self.regression * error + matching)
            of_critic = self._critic_error(x.detach(), text, draws)
            self.manual_backward(of_critic)
        for part in (self.model.denoiser, self.critic.denoiser):
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.log_dict({"error": error.detach(), "critic": of_critic.detach()}, prog_bar=True)

    def _noised(self, x: torch.Tensor, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        t = 20 + 960 * torch.rand(len(x), generator=draws).to(x.device)
        eps = torch.randn(x.shape, generator=draws).to(x)
        return self.teacher.add_noise(x, eps, t), t, eps

    @torch.no_grad()
    def _direction(self, x: torch.Tensor, text, empty, draws: torch.Generator) -> torch.Tensor:
        """Gradient of the divergence of the student from its teacher (DMD, eq. 7 and 8).

        It is normalised picture by picture.
        """
        x_t, t, _ = self._noised(x, draws)
        sigmas = (t / 1000).view(-1, 1, 1, 1)
        real = x_t - sigmas * guided_velocity(self.teacher, x_t, t, text, empty, self.guidance)
        fake = x_t - sigmas * self.critic.predict(x_t, t, text)
        return (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)

    def _critic_error(self, x: torch.Tensor, text, draws: torch.Generator) -> torch.Tensor:
        x_t, t, eps = self._noised(x, draws)
        return (self.critic.predict(x_t, t, text) - self.critic.target(x, eps, t)).square().mean()

    def configure_optimizers(self):
        optimizers = [
            optimizer
            for part in (self.model, self.critic)
            for optimizer in muon_and_adamw(part.named_parameters(), self.lr, self.muon_lr)
        ]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate) for optimizer in optimizers]

    def _rate(self, step: int) -> float:
        total = self.trainer.max_steps // self.optimizer_count
        return min(1.0, (step + 1) / self.warmup, max((total - step) / (self.cooldown * total), 0.0))
