"""Stage 2 of sd_tiny, sd3_tiny and flux_tiny: the denoiser with its text encoders, on latents of scenes."""

from collections.abc import Iterable

import lightning as L
import numpy as np
import torch

from t2i_rl.core.seeding import derive_seed
from t2i_rl.models.diffusion.base import attention_for_training
from t2i_rl.pretrain.streams import NumberedBatches
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.render import render, to_pixels


class CaptionedScenes(NumberedBatches):
    """Batches `(captions, pixels)` of training scenes, float32 pixels `(B, 3, H, W)` in [-1, 1].

    Batch `i` is a function of `(seed, i)`. A `dropped_share` of captions is empty, for
    classifier-free guidance.
    """

    def __init__(
        self, batch_size: int, weights: dict[str, float], seed: int, first: int = 0, dropped_share: float = 0.1
    ):
        super().__init__(first)
        self.batch_size, self.weights, self.seed, self.dropped_share = batch_size, weights, seed, dropped_share

    def batch(self, number: int) -> tuple[list[str], torch.Tensor]:
        rng = np.random.default_rng((self.seed, 4, number))
        examples = [sample_example(rng, self.weights) for _ in range(self.batch_size)]
        dropped = rng.random(self.batch_size) < self.dropped_share
        captions = ["" if drop else prompt.text for drop, (prompt, _) in zip(dropped, examples, strict=True)]
        return captions, to_pixels(np.stack([render(scene) for _, scene in examples]))


class DenoiserStage(L.LightningModule):
    """The denoiser learns by the mean squared error of its own parameterisation.

    Matrices learn by Muon, the rest by AdamW; the rate is flat, then falls to zero. `times` draws
    t: uniform (DDPM), or logit-normal (Esser et al. 2024, section 3.1). A `zeros_share` of batches
    carries the zero states that the stock SD3 pipeline puts in place of an absent T5, so that the
    model draws with them as well as without.
    """

    optimizer_count = 2  # Lightning counts a step for each

    def __init__(
        self,
        model,
        seed: int,
        times: str = "uniform",
        lr: float = 2e-3,
        muon_lr: float = 2e-3,
        cooldown: float = 0.5,
        warmup: int = 200,
        zeros_share: float = 0.0,
    ):
        super().__init__()
        self.model, self.seed, self.times, self.zeros_share = model, seed, times, zeros_share
        self.automatic_optimization = False
        self.lr, self.muon_lr, self.cooldown, self.warmup = lr, muon_lr, cooldown, warmup
        model.train()
        model.vae.eval().requires_grad_(False)

    def training_step(self, batch: tuple[list[str], torch.Tensor], index: int) -> None:
        captions, pixels = batch
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "pretrain", self.global_step))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            noise = torch.randn(len(pixels), *self.model.latent_shape, generator=draws)
            x0 = self.model.encode_images(pixels, noise)
        eps = torch.randn(x0.shape, generator=draws).to(x0)
        t = self._times(len(x0), draws).to(x0.device)
        with attention_for_training(self.model):
            text = self.model.encode_prompts(captions)
            if torch.rand((), generator=draws) < self.zeros_share:
                text = self._with_zeros(text)
            predicted = self.model.predict(self.model.add_noise(x0, eps, t), t, text)
            errors = (predicted - self.model.target(x0, eps, t)).square().mean(dim=(1, 2, 3))
            self.manual_backward(errors.mean())
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.log("error", errors.mean().detach(), prog_bar=True)

    def _times(self, count: int, draws: torch.Generator) -> torch.Tensor:
        if self.times == "uniform":
            return torch.randint(1000, (count,), generator=draws)
        return torch.randn(count, generator=draws).sigmoid() * 1000

    @staticmethod
    def _with_zeros(text):
        zeros = text.embeds.new_zeros(len(text), 256, text.embeds.shape[-1])
        return type(text)(torch.cat([text.embeds, zeros], dim=1), text.pooled)

    def configure_optimizers(self):
        optimizers = muon_and_adamw(self.model.named_parameters(), self.lr, self.muon_lr)
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate) for optimizer in optimizers]

    def _rate(self, step: int) -> float:
        total = self.trainer.max_steps // self.optimizer_count
        left = (total - step) / (self.cooldown * total)
        return min(1.0, (step + 1) / self.warmup, max(left, 0.0))


def muon_and_adamw(
    named: Iterable[tuple[str, torch.nn.Parameter]], lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the denoiser's blocks, AdamW for whatever else learns."""
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    matrices = [p for name, p in trainable if p.ndim == 2 and "blocks" in name and "denoiser" in name]
    chosen = set(map(id, matrices))
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for _, p in trainable if id(p) not in chosen], lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
