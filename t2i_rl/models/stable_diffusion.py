"""Stable Diffusion 1.5 and XL: UNets with cross-attention that predict the noise (Rombach et al. 2022; Podell et al. 2023)."""

import torch
from torch import nn

from t2i_rl.errors import UserError
from t2i_rl.models.diffusion import LatentDiffusion, TextEncoding, load_pipeline


class StableDiffusion(LatentDiffusion):
    """`x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps` with the scheduler's cumulated alphas at whole `t`; predicts `eps`.

    Args:
        scheduler: what draws: `ddim`, or the checkpoint's `own` (models of one step).
    """

    family = "diffusion"
    kind = "sd15"

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        revision: str | None = None,
        guidance_scale: float = 7.0,
        steps: int = 30,
        size: int | None = None,
        soft_tokens: str | None = None,
        device: str | None = None,
        scheduler: str = "ddim",
    ):
        from diffusers import StableDiffusionPipeline

        unchecked = {"safety_checker": None, "requires_safety_checker": False}
        pipe = load_pipeline(StableDiffusionPipeline, path, dtype, revision, device, **unchecked)
        self._set_up(pipe, path, revision, scheduler, guidance_scale, steps, size, soft_tokens)

    def _set_up(self, pipe, path: str, revision: str | None, scheduler: str, *settings) -> None:
        from diffusers import DDIMScheduler

        if scheduler not in ("ddim", "own"):
            raise UserError(f"model.scheduler must be ddim or own, not {scheduler!r}")
        if scheduler == "ddim":
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        super().__init__(pipe, *settings)
        self.path, self.revision = str(path), revision

    def scheduled(self, steps: int):
        if steps > 1 and "Ancestral" in type(self.pipe.scheduler).__name__:
            raise UserError(
                "an ancestral sampler adds fresh noise between its steps: gradients to the noise are for model.steps=1"
            )
        return super().scheduled(steps)

    def encode_prompts(self, prompts: list[str]) -> TextEncoding:
        return TextEncoding(self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0])

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alphas = self.pipe.scheduler.alphas_cumprod.to(x0.device)[self.whole(t).to(x0.device)].to(x0.dtype)
        alphas = alphas.view(-1, 1, 1, 1)
        return alphas.sqrt() * x0 + (1 - alphas).sqrt() * eps

    @staticmethod
    def whole(t: torch.Tensor) -> torch.Tensor:
        """Times as indices 0 to 999."""
        return t.floor().long().clamp(0, 999)

    def target(self, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return eps

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, soft_tokens=None) -> torch.Tensor:
        return self._denoised(x_t, t, text, None, soft_tokens)

    def _denoised(
        self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, conditions: dict | None, soft_tokens=None
    ):
        return self.denoiser(
            x_t.to(self.dtype),
            self.whole(t).to(x_t.device),
            encoder_hidden_states=text.embeds.to(self.dtype),
            added_cond_kwargs=conditions,
            return_dict=False,
            **self._carried(soft_tokens),
        )[0].float()

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.down_blocks, self.denoiser.mid_block, *self.denoiser.up_blocks]


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, pooled text and sizes as further conditions.

    Args:
        size_ids: (original height, width, crop top, left, target height, width) that training names; drawing names the size it draws.
        vae: another autoencoder, by folder or hub id: SDXL's own overflows in float16.
    """

    family = "diffusion"
    kind = "sdxl"

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        revision: str | None = None,
        guidance_scale: float = 7.0,
        steps: int = 30,
        size: int | None = None,
        soft_tokens: str | None = None,
        device: str | None = None,
        vae: str | None = None,
        size_ids: tuple[int, ...] = (512, 512, 0, 0, 512, 512),
        scheduler: str = "ddim",
    ):
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline

        parts = {"vae": load_pipeline(AutoencoderKL, vae, dtype)} if vae else {}
        pipe = load_pipeline(StableDiffusionXLPipeline, path, dtype, revision, device, **parts)
        self._set_up(pipe, path, revision, scheduler, guidance_scale, steps, size, soft_tokens)
        self.size_ids = tuple(size_ids)

    def encode_prompts(self, prompts: list[str]) -> TextEncoding:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return TextEncoding(embeds, pooled)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, soft_tokens=None) -> torch.Tensor:
        return self._denoised(x_t, t, text, self._conditions(text, self.size_ids), soft_tokens)

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding) -> torch.Tensor:
        return self._denoised(x_t, t, text, self._conditions(text, (self.size, self.size, 0, 0, self.size, self.size)))

    def empty_text(self, count: int) -> TextEncoding:
        text = super().empty_text(count)
        return text.map(torch.zeros_like) if self.pipe.config.force_zeros_for_empty_prompt else text

    def _conditions(self, text: TextEncoding, size_ids: tuple[int, ...]) -> dict:
        ids = torch.tensor([size_ids] * len(text), device=self.device, dtype=self.dtype)
        return {"text_embeds": text.pooled.to(self.dtype), "time_ids": ids}
