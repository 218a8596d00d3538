"""Stable Diffusion 1.5 and XL: UNets by DDPM (Rombach et al. 2022; Podell et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Device, Dtype, Guidance, Pixels, Whole
from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding, load_pipeline
from t2i_rl.models.diffusion.schedulers import check_diffusion, ddim


class StableDiffusion(LatentDiffusion):
    """`x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps` with the cumulated alphas at whole `t`.

    The UNet predicts `eps`, or what the scheduler's `prediction_type` says: `x0`, or
    `v = sqrt(a_t) eps - sqrt(1 - a_t) x0` (Salimans and Ho 2022).

    Args:
        scheduler: what draws: `ddim`, or the checkpoint's `own` (models of one step).
    """

    family = "diffusion"
    kind = "sd15"

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        revision: str | None = None,
        guidance_scale: Guidance = 7.0,
        steps: Count = 30,
        size: Pixels | None = None,
        soft_tokens: str | None = None,
        device: Device | None = None,
        scheduler: str = "ddim",
    ):
        from diffusers import StableDiffusionPipeline

        self.check_files({"path": path, "revision": revision, "scheduler": scheduler})
        unchecked = {"safety_checker": None, "requires_safety_checker": False}
        pipe = load_pipeline(StableDiffusionPipeline, path, dtype, revision, device, **unchecked)
        self._set_up(pipe, path, revision, scheduler, guidance_scale, steps, size, soft_tokens)

    @classmethod
    def check_scheduler(cls, path: str, config: Mapping, settings: Mapping) -> None:
        drawn_by = settings.get("scheduler", "ddim")
        if drawn_by not in ("ddim", "own"):
            raise UserError(f"model.scheduler must be ddim or own, not {drawn_by!r}")
        check_diffusion(path, config, drawn_by)

    def _set_up(self, pipe: Any, path: str, revision: str | None, scheduler: str, *settings: Any) -> None:
        if scheduler == "ddim":
            pipe.scheduler = ddim(pipe.scheduler)
        super().__init__(pipe, *settings)
        self.path, self.revision = str(path), revision

    def scheduled(self, steps: int) -> Any:
        if steps > 1 and "Ancestral" in type(self.pipe.scheduler).__name__:
            raise UserError(
                "an ancestral sampler adds fresh noise between its steps: gradients to the noise are for model.steps=1"
            )
        return super().scheduled(steps)

    def _encoded(self, prompts: list[str]) -> TextEncoding:
        return TextEncoding(self.pipe.encode_prompt(prompts, self.device, 1, False)[0])

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alphas = self._alphas(x0, t)
        return alphas.sqrt() * x0 + (1 - alphas).sqrt() * eps

    def _alphas(self, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The cumulated alphas `(B, 1, 1, 1)` at times `t`, like `x0`."""
        alphas = self.pipe.scheduler.alphas_cumprod.to(x0.device)[self.whole(t).to(x0.device)].to(x0.dtype)
        return alphas.view(-1, 1, 1, 1)

    @staticmethod
    def whole(t: torch.Tensor) -> torch.Tensor:
        """Times as indices 0 to 999."""
        return t.floor().long().clamp(0, 999)

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        predicted = self.pipe.scheduler.config.get("prediction_type", "epsilon")
        if predicted == "epsilon":
            return eps
        if predicted == "sample":
            return x0
        alphas = self._alphas(x0, t)
        return alphas.sqrt() * eps - (1 - alphas).sqrt() * x0

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, soft_tokens=None, empty=None
    ) -> torch.Tensor:
        return self._denoised(x_t, self.whole(t), text, self._conditions(text), self._carried(soft_tokens, empty))

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, empty=None) -> torch.Tensor:
        """`predict` at the sampler's own times, which need not be whole.

        SDXL is told the size that is drawn.
        """
        size = (self.size, self.size, 0, 0, self.size, self.size)
        return self._denoised(x_t, t, text, self._conditions(text, size), self._carried(None, empty))

    def _conditions(self, text: TextEncoding, size_ids: tuple[int, ...] | None = None) -> dict | None:
        """What the UNet reads beside times and texts: nothing here."""
        return None

    def _denoised(
        self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, conditions: dict | None, carried: dict
    ) -> torch.Tensor:
        return self.denoiser(
            x_t.to(self.dtype),
            t.to(x_t.device),
            encoder_hidden_states=text.embeds.to(self.dtype),
            added_cond_kwargs=conditions,
            return_dict=False,
            **carried,
        )[0].float()

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.down_blocks, self.denoiser.mid_block, *self.denoiser.up_blocks]


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, pooled text and sizes as further conditions.

    Args:
        size_ids: (original height, width, crop top, left, target height, width) that training
            names; drawing names the size it draws.
        vae: another autoencoder, by folder or hub id: SDXL's own overflows in float16.
    """

    family = "diffusion"
    kind = "sdxl"
    encoders = {"tokenizer": "CLIP", "tokenizer_2": "CLIP"}

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        revision: str | None = None,
        guidance_scale: Guidance = 7.0,
        steps: Count = 30,
        size: Pixels | None = None,
        soft_tokens: str | None = None,
        device: Device | None = None,
        vae: str | None = None,
        size_ids: tuple[Whole, Whole, Whole, Whole, Whole, Whole] = (512, 512, 0, 0, 512, 512),
        scheduler: str = "ddim",
    ):
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline

        self.check_files({"path": path, "revision": revision, "scheduler": scheduler, "vae": vae})
        parts = {"vae": load_pipeline(AutoencoderKL, vae, dtype)} if vae else {}
        pipe = load_pipeline(StableDiffusionXLPipeline, path, dtype, revision, device, **parts)
        self._set_up(pipe, path, revision, scheduler, guidance_scale, steps, size, soft_tokens)
        self.size_ids = tuple(size_ids)

    def _encoded(self, prompts: list[str]) -> TextEncoding:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return TextEncoding(embeds, pooled)

    def empty_text(self, count: int) -> TextEncoding:
        text = super().empty_text(count)
        return text.map(torch.zeros_like) if self.pipe.config.force_zeros_for_empty_prompt else text

    def _conditions(self, text: TextEncoding, size_ids: tuple[int, ...] | None = None) -> dict | None:
        ids = torch.tensor([size_ids or self.size_ids] * len(text), device=self.device, dtype=self.dtype)
        return {"text_embeds": text.pooled.to(self.dtype), "time_ids": ids}
