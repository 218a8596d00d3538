"""SANA-Sprint: one or a few steps by continuous-time consistency (arXiv 2503.09641).

Its transformer has linear attention.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Device, Dtype, Guidance, Pixels
from t2i_rl.core.readers import Reading
from t2i_rl.models.diffusion.base import Denoise, LatentDiffusion, TextEncoding, load_pipeline
from t2i_rl.models.diffusion.schedulers import check_trigflow


class SanaSprint(LatentDiffusion):
    """TrigFlow: `x_t = cos(t) x0 + sin(t) sigma_data eps`.

    At one step it draws `cos(t) x - sin(t) F(x)` from `t = pi/2`. A text's `pooled` is its mask
    here. It is drawn from and through, not trained: the noise of pairs is not defined for it.

    Args:
        guidance_scale: embedded, times the checkpoint's own factor.
        instruction: prepend the pipeline's long instruction, as its default does.
    """

    family = "one_step"
    kind = "sana"
    encoders = {"tokenizer": "Gemma"}
    denoiser_name = "transformer"
    embeds_guidance = True

    def __init__(
        self,
        path: str,
        dtype: Dtype = "bfloat16",
        revision: str | None = None,
        guidance_scale: Guidance = 4.5,
        steps: Count = 1,
        size: Pixels | None = None,
        instruction: bool = True,
        max_sequence_length: Count = 300,
        device: Device | None = None,
    ):
        from diffusers import SanaSprintPipeline

        self.check_files({"path": path, "revision": revision})
        pipe = load_pipeline(SanaSprintPipeline, path, dtype, revision, device)
        super().__init__(pipe, guidance_scale, steps, size, None)
        self.path, self.revision = str(path), revision
        self.instruction, self.max_sequence_length = instruction, max_sequence_length

    @classmethod
    def check_scheduler(cls, path: str, config: Mapping, settings: Mapping) -> None:
        check_trigflow(path, config)

    @classmethod
    def reading_of(cls, encoder: str, tokenizer: Any, settings: Mapping[str, Any]) -> Reading:
        """The window is for the instruction and `max_sequence_length` tokens, less two."""
        from diffusers import SanaSprintPipeline

        wording = "\n".join(instruction_of(SanaSprintPipeline)) if settings["instruction"] else ""
        room = len(tokenizer(wording).input_ids) - 2 if wording else 0
        limit = room + settings["max_sequence_length"]
        return Reading(encoder, tokenizer, limit, lambda text: wording + text.lower().strip())

    def _encoded(self, prompts: list[str]) -> TextEncoding:
        embeds, mask = self.pipe.encode_prompt(prompts, device=self.device, **self.text_settings())
        return TextEncoding(embeds, mask)

    def text_settings(self) -> dict[str, Any]:
        """What the pipeline takes to encode a text as it does while it draws."""
        instruction = self._instruction()
        return {"complex_human_instruction": instruction, "max_sequence_length": self.max_sequence_length}

    def _instruction(self) -> list[str] | None:
        return instruction_of(type(self.pipe)) if self.instruction else None

    def scheduled(self, steps: int) -> Any:
        if steps != 1:
            raise UserError("SANA-Sprint adds fresh noise between its steps: gradients to the noise are for steps=1")
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(1, device=self.device, intermediate_timesteps=None)
        return scheduler

    def noise_to_latents(
        self, noise: torch.Tensor, denoise: Denoise, steps: int, eta: float = 0.0, last_step_noise: bool = True
    ) -> torch.Tensor:
        scheduler = self.scheduled(steps)
        sigma_data, t = scheduler.config.sigma_data, scheduler.timesteps[0]
        x = noise * sigma_data
        prediction = denoise(x / sigma_data, t.expand(len(x))) * sigma_data
        return scheduler.step(prediction, t, x, return_dict=False)[1] / sigma_data

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, empty=None) -> torch.Tensor:
        """TrigFlow's velocity of `x_t`, which is in units of sigma_data.

        The transformer knows linear flow times: `x_t` is scaled there and back.
        """
        sigmas = (t.sin() / (t.cos() + t.sin())).view(-1, 1, 1, 1)
        scale = (sigmas**2 + (1 - sigmas) ** 2).sqrt()
        guidance = self.guidance_scale * self.denoiser.config.guidance_embeds_scale
        velocity = self.denoiser(
            (x_t * scale).to(self.dtype),
            encoder_hidden_states=text.embeds.to(self.dtype),
            encoder_attention_mask=text.pooled,
            guidance=torch.full([len(x_t)], guidance, device=x_t.device, dtype=self.dtype),
            timestep=sigmas.flatten(),
            return_dict=False,
        )[0].float()
        return ((1 - 2 * sigmas) * x_t * scale + (1 - 2 * sigmas + 2 * sigmas**2) * velocity) / scale

    def call_settings(self) -> dict:
        timesteps = {"intermediate_timesteps": None} if self.steps != 2 else {}
        return {"use_resolution_binning": False, **self.text_settings(), **timesteps}

    def blocks(self) -> list[nn.Module]:
        return list(self.denoiser.transformer_blocks)


def instruction_of(stock_class: type) -> list[str]:
    """The instruction that the pipeline puts in front of a prompt where none is given."""
    return signature(stock_class.__call__).parameters["complex_human_instruction"].default
