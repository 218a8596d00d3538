"""What denoisers of diffusers have in common: texts, latents, noise, prediction, and drawing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2i_rl.core.contracts import Generation
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_finite
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.pixels import OVERFLOW, to_bytes
from t2i_rl.core.readers import Reader
from t2i_rl.models.diffusion.config_files import ConfigFiles
from t2i_rl.models.diffusion.pipelines import load_pipeline as load_pipeline
from t2i_rl.models.diffusion.soft_tokens import Attached, SoftTokens
from t2i_rl.models.diffusion.splice import EMPTY, KEY, carrier
from t2i_rl.models.diffusion.text_encoders import TEXT_ENCODERS, TextEncoding

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LatentDiffusion(ConfigFiles):
    """A stock pipeline as a module: parts that learn or encode are submodules, `pipe` draws.

    A subclass says how noise is added and what is predicted. Times `t` count from 0 (clean) to 1000
    everywhere.

    embeds_guidance: the denoiser is told the guidance's scale, so that a step takes one prediction.
    max_sequence_length: tokens that an encoder without a window of its own reads.
    """

    family = "diffusion"
    embeds_guidance = False
    max_sequence_length: int | None = None

    def __init__(self, pipe: Any, guidance_scale: float, steps: int, size: int | None, soft_tokens: str | None):
        super().__init__()
        self.pipe = pipe
        self.guidance_scale, self.steps = guidance_scale, steps
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.vae = pipe.vae
        self.vae.decoder.register_forward_hook(check_decoded)
        encoders = [pipe.components.get(name) for name in TEXT_ENCODERS]  # a kind of pipeline has one to three
        self.text_encoders = nn.ModuleList(encoder for encoder in encoders if encoder is not None)
        self.size = size or self.denoiser.config.sample_size * pipe.vae_scale_factor
        pipe.set_progress_bar_config(disable=True)
        self.attached: Attached | None = None
        if soft_tokens:
            self.attach(SoftTokens.load(soft_tokens).requires_grad_(False))

    @cached_property
    def reader(self) -> Reader:
        """See `text_reader`; of the pipeline as it is loaded."""
        tokenizers = {name: self.pipe.components[name] for name in self.encoders}
        present = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
        return self.reader_of(present, vars(self))

    def attach(self, bank: SoftTokens, branch: int = 0, null_branch: int | None = None) -> Attached:
        """Put soft tokens to work in the denoiser.

        Raises:
            UserError: it has some already, or these are made for another architecture.
        """
        if self.attached is not None:
            raise UserError("this model has soft tokens already (model.soft_tokens): take them out before others go in")
        self.attached = Attached(self.denoiser, bank, branch, null_branch, self.pipe)
        return self.attached

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def encode_prompts(self, prompts: list[str]) -> TextEncoding:
        """Texts as the pipeline itself encodes them; differentiable in the text encoders.

        Raises:
            UserError: a prompt spells a special token that its tokenizer cannot read as text.
        """
        self.reader.check(prompts)
        return self._encoded(list(prompts))

    def _encoded(self, prompts: list[str]) -> TextEncoding:
        raise NotImplementedError

    def compact(self, text: TextEncoding) -> dict[str, torch.Tensor]:
        """What has to be kept of texts, without padding that is known beforehand, row by row."""
        return {"embeds": text.embeds} if text.pooled is None else {"embeds": text.embeds, "pooled": text.pooled}

    def expand(self, parts: dict[str, torch.Tensor]) -> TextEncoding:
        """The texts of which `compact` gave these parts."""
        return TextEncoding(parts["embeds"], parts.get("pooled"))

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation `(B, C, h, w)`, float32, of the autoencoder's latents of pixels.

        Pixels are `(B, 3, H, W)` in [-1, 1].

        Raises:
            UserError: they are not finite.
        """
        latents = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = latents.mean.float(), latents.std.float()
        check_finite(mean + std, "the autoencoder's latents of these images", OVERFLOW)
        return mean, std

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents as the denoiser knows them: shifted, then scaled."""
        return (latents - self._shift) * self.vae.config.scaling_factor

    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The denoiser's latents of pixels `(B, 3, H, W)` in [-1, 1].

        They are sampled with standard normal `noise` `(B, C, h, w)`, and not the mode.
        """
        mean, std = self.posterior(pixels)
        return self.scaled(mean + std * noise.to(mean))

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The denoiser's latents -> float32 pixels `(B, 3, H, W)`, about [-1, 1]."""
        latents = latents / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Noised latents of the training process at times `t` `(B,)`, in units of 0 to 1000."""
        raise NotImplementedError

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What `predict` ought to give at times `t` `(B,)`, in the denoiser's parametrisation."""
        raise NotImplementedError

    def predict(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        text: TextEncoding,
        soft_tokens: torch.Tensor | None = None,
        empty: bool | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoiser's own output, float32, for latents `(B, C, h, w)` at times `t` `(B,)`.

        Args:
            text: of `B` prompts.
            soft_tokens: `(B, layers, K, D)`, read in place of the attached bank's own.
            empty: whose texts stand for guidance's empty prompt: none, all, or a mask `(B,)`. An
                attached bank with a branch for the empty prompt has to be told; no other asks.

        Raises:
            UserError: the attached bank has a branch for the empty prompt, and `empty` does not say
                who reads it.
        """
        raise NotImplementedError

    def _carried(self, soft_tokens: torch.Tensor | None, empty: bool | torch.Tensor | None = None) -> dict:
        """The argument of the denoiser's call that carries soft tokens, or whose text is empty."""
        if soft_tokens is not None:
            if self.attached is None:
                raise ValueError(
                    "predict(soft_tokens=...) needs the hooks that attach() installs: without them diffusers drops "
                    "the tokens"
                )
            return {carrier(self.denoiser): {KEY: soft_tokens}}
        if self.attached is None or not self.attached.enabled or not self.attached.tells_empty_apart:
            return {}
        if empty is None:
            raise UserError(
                "these soft tokens have a branch for the empty prompt: predict(..., empty=False) for prompts, True "
                "for the empty one, or a mask of the rows"
            )
        return {carrier(self.denoiser): {EMPTY: empty}}

    def free_text_encoders(self) -> None:
        """Drop the text encoders: what is drawn from here on has its texts encoded already."""
        self.text_encoders = nn.ModuleList()
        present = [name for name in TEXT_ENCODERS if self.pipe.components.get(name) is not None]
        self.pipe.register_modules(**dict.fromkeys(present))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def guided(self) -> bool:
        """Whether drawing takes two predictions a step."""
        return self.guidance_scale > 1 and not self.embeds_guidance

    def empty_text(self, count: int) -> TextEncoding:
        """What guidance reads in place of a prompt."""
        return self.encode_prompts([""] * count)

    def denoise(
        self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, empty: bool | torch.Tensor | None = None
    ) -> torch.Tensor:
        """`predict` with the conditions that the pipeline names while it draws."""
        return self.predict(x_t, t, text, empty=empty)

    def scheduled(self, steps: int) -> Any:
        """A scheduler of the checkpoint's kind and settings, its timesteps set.

        It is a new one, since one that was used would raise.
        """
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def noise_to_latents(
        self, noise: torch.Tensor, denoise: Denoise, steps: int, eta: float = 0.0, last_step_noise: bool = True
    ) -> torch.Tensor:
        """The sampler's latents from standard normal `noise` `(B, C, h, w)`, with gradients.

        Args:
            denoise: gives the prediction of `(x_t, t)`.
            eta: above 0 (DDIM) noise is `(B, 1 + steps, C, h, w)`: the first starts, the others are
                what each step adds.
            last_step_noise: without it the last step adds no noise and goes the whole way along its
                direction, as eta 0 does.
        """
        scheduler, step_settings = self.scheduled(steps), [{}] * steps
        if eta > 0:
            step_settings = [{"eta": eta, "variance_noise": step_noise} for step_noise in noise[:, 1:].unbind(1)]
            if not last_step_noise:
                step_settings[-1] = {"eta": 0.0}
            noise = noise[:, 0]
        # flow matching's schedulers have neither of the two: noise is as it is, and so is what is
        # denoised
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        scales_input = hasattr(scheduler, "scale_model_input")
        for t, settings in zip(scheduler.timesteps, step_settings, strict=True):
            scaled = scheduler.scale_model_input(x, t) if scales_input else x
            x = scheduler.step(denoise(scaled, t.expand(len(x))), t, x, return_dict=False, **settings)[0]
        return x

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(C, h, w)` of one image's latents."""
        side = self.size // self.pipe.vae_scale_factor
        return self.vae.config.latent_channels, side, side

    def prepare(self) -> None:
        """Nothing: the pipeline draws with the live weights."""

    def sampling(self) -> dict[str, Any]:
        """The settings that a drawn image depends on besides weights, prompt and seed."""
        scheduler = {key: value for key, value in self.pipe.scheduler.config.items() if not key.startswith("_")}
        return {
            "guidance_scale": self.guidance_scale,
            "steps": self.steps,
            "size": self.size,
            "scheduler": type(self.pipe.scheduler).__name__,
            "scheduler_config": scheduler,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self._tokens_drawn_with(),
        }

    def _tokens_drawn_with(self) -> dict:
        if self.attached is None or not self.attached.enabled:
            return {"soft_tokens": None}
        null = self.attached.null_branch
        return {"soft_tokens": weights_sha256(self.attached.bank)} | ({} if null is None else {"null_branch": null})

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int], **settings: Any) -> np.ndarray:
        """One image a prompt, uint8 `(B, H, W, 3)`, by the stock pipeline.

        Row `i` depends on `seeds[i]` alone. `settings` go to the pipeline's call.

        Raises:
            UserError: a latent or a pixel is not finite, or guidance is off and the soft tokens are
                made for it.
        """
        self.reader.check(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        own_settings = {"guidance_scale": self.guidance_scale, "num_inference_steps": self.steps}
        settings = own_settings | self.call_settings() | settings
        scale = settings["guidance_scale"]
        never_empty = scale <= 1 or self.embeds_guidance
        if self.attached is not None and self.attached.tells_empty_apart and never_empty:
            raise UserError(
                "these soft tokens have a branch for the empty prompt, which this model never asks at "
                f"model.guidance_scale={scale}: take one above 1, or tokens without such a branch"
            )
        settings |= {"height": self.size, "width": self.size, "output_type": "np"}
        images = self.pipe(prompt=list(prompts), generator=generators, **settings).images
        return to_bytes(torch.from_numpy(images).permute(0, 3, 1, 2))

    def call_settings(self) -> dict[str, Any]:
        """What the pipeline's call takes beside guidance and steps."""
        return {}

    def generate(self, prompts: list[str], seeds: list[int], mode: str = "direct", fresh: bool = True) -> Generation:
        """Draw one image a prompt.

        Raises:
            UserError: `mode` is not `direct`.
        """
        if mode != "direct":
            raise UserError(f"a diffusion model draws in mode direct only, not {mode!r}: set mode=direct")
        return Generation(self.sample(prompts, seeds))

    def blocks(self) -> list[nn.Module]:
        """The denoiser's blocks."""
        raise NotImplementedError


def check_decoded(decoder: nn.Module, latents: tuple, pixels: torch.Tensor) -> None:
    """A hook of the autoencoder's decoder, through which every image comes.

    A later clamp would make infinity white.

    Raises:
        UserError: its pixels are not finite; the line says whether its latents were.
    """
    if pixels.device.type == "meta" or torch.isfinite(pixels).all():
        return
    check_finite(
        latents[0],
        "the latents that the denoiser drew",
        "the usual cause is a denoiser or a text encoder in float16, which overflows (take model.dtype=bfloat16 or "
        "float32), or a step over the noise that is too long (method.optimizer.lr); else the weights are broken",
    )
    check_finite(pixels, "the pixels that the model drew", OVERFLOW)


def attention_for_training(model: LatentDiffusion) -> AbstractContextManager[None]:
    """Plain matrix products in bfloat16 on a CPU; else torch's own choice.

    There the fused kernel's backward pass doubles a step's time.
    """
    half = model.dtype == torch.bfloat16 or torch.is_autocast_enabled(model.device.type)
    return sdpa_kernel(SDPBackend.MATH) if half and model.device.type == "cpu" else nullcontext()
