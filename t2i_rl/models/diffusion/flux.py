"""FLUX.1: MM-DiT trained by flow matching on packed latents (Black Forest Labs 2024).

schnell draws in one step; dev has its guidance embedded.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from t2i_rl.core.numbers import Count, Device, Dtype, Guidance, Pixels
from t2i_rl.models.diffusion.base import TextEncoding, load_pipeline
from t2i_rl.models.diffusion.flow import FlowMatching


class Flux(FlowMatching):
    """Latents are `(B, C, h, w)` here; the transformer reads 2x2 of them as a token.

    Args:
        guidance_scale: what dev's embedding is told; schnell has none and takes 0.
        size: pixels a side.
    """

    family = "diffusion"
    kind = "flux"
    encoders = {"tokenizer": "CLIP", "tokenizer_2": "T5"}
    embeds_guidance = True

    def __init__(
        self,
        path: str,
        size: Pixels,
        dtype: Dtype = "float32",
        revision: str | None = None,
        guidance_scale: Guidance = 0.0,
        steps: Count = 1,
        max_sequence_length: Count = 256,
        soft_tokens: str | None = None,
        device: Device | None = None,
    ):
        from diffusers import FluxPipeline

        self.check_files({"path": path, "revision": revision})
        pipe = load_pipeline(FluxPipeline, path, dtype, revision, device)
        super().__init__(pipe, guidance_scale, steps, size, soft_tokens)
        self.path, self.revision, self.max_sequence_length = str(path), revision, max_sequence_length

    def _encoded(self, prompts: list[str]) -> TextEncoding:
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return TextEncoding(embeds, pooled)

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, soft_tokens=None, empty=None
    ) -> torch.Tensor:
        batch, channels, height, width = x_t.shape
        positions = {"device": x_t.device, "dtype": self.dtype}
        guidance = torch.full([batch], self.guidance_scale, device=x_t.device)
        velocity = self.denoiser(
            hidden_states=self.pipe._pack_latents(x_t.to(self.dtype), batch, channels, height, width),
            timestep=(t / 1000).to(x_t.device, self.dtype),
            guidance=guidance if self.denoiser.config.guidance_embeds else None,
            encoder_hidden_states=text.embeds.to(self.dtype),
            pooled_projections=text.pooled.to(self.dtype),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, **positions),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, **positions),
            return_dict=False,
            **self._carried(soft_tokens, empty),
        )[0]
        factor = self.pipe.vae_scale_factor
        return self.pipe._unpack_latents(velocity, height * factor, width * factor, factor).float()

    def scheduled(self, steps: int) -> Any:
        """As the pipeline has it: even sigmas, moved by the number of tokens for dev."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        tokens, config = self.latent_shape[1] * self.latent_shape[2] // 4, scheduler.config
        bounds = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=calculate_shift(tokens, *bounds))
        return scheduler

    def call_settings(self) -> dict:
        return {"max_sequence_length": self.max_sequence_length}

    def blocks(self) -> list[nn.Module]:
        return [*self.denoiser.transformer_blocks, *self.denoiser.single_transformer_blocks]
