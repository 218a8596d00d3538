"""Stable Diffusion 3 and 3.5: MM-DiT trained by flow matching (Esser et al. 2024)."""

import torch
import torch.nn.functional as F
from torch import nn

from t2i_rl.core.numbers import Count, Device, Dtype, Guidance, Pixels, Whole
from t2i_rl.models.diffusion.base import TextEncoding, load_pipeline
from t2i_rl.models.diffusion.flow import FlowMatching


class SD3(FlowMatching):
    """MM-DiT under two CLIP text encoders and, where the checkpoint has one, T5."""

    family = "diffusion"
    kind = "sd3"
    encoders = {"tokenizer": "CLIP", "tokenizer_2": "CLIP", "tokenizer_3": "T5"}

    def __init__(
        self,
        path: str,
        dtype: Dtype = "float32",
        revision: str | None = None,
        guidance_scale: Guidance = 4.0,
        steps: Count = 28,
        size: Pixels | None = None,
        max_sequence_length: Whole = 256,
        soft_tokens: str | None = None,
        device: Device | None = None,
    ):
        from diffusers import StableDiffusion3Pipeline

        self.check_files({"path": path, "revision": revision})
        pipe = load_pipeline(StableDiffusion3Pipeline, path, dtype, revision, device)
        super().__init__(pipe, guidance_scale, steps, size, soft_tokens)
        self.path, self.revision, self.max_sequence_length = str(path), revision, max_sequence_length

    def _encoded(self, prompts: list[str]) -> TextEncoding:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return TextEncoding(embeds, pooled)

    def compact(self, text: TextEncoding) -> dict[str, torch.Tensor]:
        """CLIP's states without the zeros that widen them to T5's, and T5's where there are."""
        length, width = self.pipe.tokenizer_max_length, self._clip_width
        parts = {"clip": text.embeds[:, :length, :width], "pooled": text.pooled}
        return parts | ({"t5": text.embeds[:, length:]} if self.pipe.text_encoder_3 is not None else {})

    def expand(self, parts: dict[str, torch.Tensor]) -> TextEncoding:
        clip, width = parts["clip"], self.denoiser.config.joint_attention_dim
        t5 = parts.get("t5", clip.new_zeros(len(clip), self.max_sequence_length, width))
        return TextEncoding(torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], dim=1), parts["pooled"])

    @property
    def _clip_width(self) -> int:
        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2)
        return sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, soft_tokens=None, empty=None
    ) -> torch.Tensor:
        return self.denoiser(
            hidden_states=x_t.to(self.dtype),
            timestep=t.to(x_t.device),
            encoder_hidden_states=text.embeds.to(self.dtype),
            pooled_projections=text.pooled.to(self.dtype),
            return_dict=False,
            **self._carried(soft_tokens, empty),
        )[0].float()

    def call_settings(self) -> dict:
        return {"max_sequence_length": self.max_sequence_length}

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)
