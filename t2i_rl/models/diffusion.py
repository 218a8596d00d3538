"""What text-to-image denoisers of diffusers have in common: texts, latents, noise, prediction, and pictures from the stock pipeline."""

from contextlib import nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
from diffusers import ConfigMixin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2i_rl import loading
from t2i_rl.errors import UserError
from t2i_rl.hashing import weights_sha256
from t2i_rl.models.soft_tokens import Attached, SoftTokens
from t2i_rl.models.splice import KEY, carrier

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class TextEncoding:
    """What the denoiser reads of `B` prompts: `embeds` `(B, N, D)` and, for SDXL and SD3, `pooled` `(B, P)`."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows) -> "TextEncoding":
        return self.map(lambda part: part[rows])

    def map(self, change) -> "TextEncoding":
        """`change` of every tensor."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return TextEncoding(**{name: None if part is None else change(part) for name, part in parts.items()})


@dataclass
class Drawing:
    """Images uint8 `(B, H, W, 3)`; a diffusion model writes no plans."""

    images: np.ndarray
    plans: list[str]
    plan_lengths: list[int]


class LatentDiffusion(nn.Module):
    """A stock pipeline as a module: the parts that learn or encode are submodules, `pipe` is how pictures are drawn.

    A subclass names the name of its denoiser there, how noise is added and what is predicted. `tokens` is the bank at work in the
    denoiser (`attach`), None without; times `t` count from 0 (clean) to 1000 everywhere.
    """

    family = "diffusion"
    kind = ""  # which of a method's presets are meant
    denoiser_name = "unet"
    embeds_guidance = False  # told to the denoiser, rather than taken from two predictions

    def __init__(self, pipe, guidance_scale: float, steps: int, size: int | None, soft_tokens: str | None):
        super().__init__()
        self.pipe = pipe
        self.guidance_scale, self.steps = guidance_scale, steps
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.vae = pipe.vae
        self.text_encoders = nn.ModuleList(
            part for name in TEXT_ENCODERS if (part := getattr(pipe, name, None)) is not None
        )
        self.size = size or self.denoiser.config.sample_size * pipe.vae_scale_factor
        pipe.set_progress_bar_config(disable=True)
        self.tokens: Attached | None = None
        if soft_tokens:
            self.attach(SoftTokens.load(soft_tokens).requires_grad_(False))

    @classmethod
    def image_size(cls, settings: dict) -> int:
        """The side in pixels of what a config's checkpoint draws; reads its config files, no weights.

        Raises:
            UserError: they can be neither found nor downloaded; the line names what to do.
        """
        path, where = settings["path"], {"revision": settings.get("revision")}
        try:
            denoiser = _Config.load_config(path, subfolder=cls.denoiser_name, **where)
            vae = _Config.load_config(path, subfolder="vae", **where)
        except (OSError, ValueError) as error:
            raise loading.cannot_load(path, error) from error
        stages = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        return settings.get("size") or denoiser["sample_size"] * 2 ** (len(stages) - 1)

    def attach(self, bank: SoftTokens, branch: int = 0, null_branch: int | None = None) -> Attached:
        """Put soft tokens to work in the denoiser.

        Raises:
            UserError: it has some already, or these are made for another architecture.
        """
        if self.tokens is not None:
            raise UserError("this model has soft tokens already (model.soft_tokens): take them out before others go in")
        self.tokens = Attached(self.denoiser, bank, branch, null_branch)
        return self.tokens

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    def encode_prompts(self, prompts: list[str]) -> TextEncoding:
        """Texts as the pipeline itself encodes them; differentiable in the text encoders."""
        raise NotImplementedError

    def compact(self, text: TextEncoding) -> dict[str, torch.Tensor]:
        """What has to be kept of texts, without padding that is known beforehand; rows stay rows."""
        return {name: part for name, part in (("embeds", text.embeds), ("pooled", text.pooled)) if part is not None}

    def expand(self, kept: dict[str, torch.Tensor]) -> TextEncoding:
        """What `compact` was given."""
        return TextEncoding(kept["embeds"], kept.get("pooled"))

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation `(B, C, h, w)`, float32, of the autoencoder's latents of pixels `(B, 3, H, W)` in [-1, 1]."""
        latents = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return latents.mean.float(), latents.std.float()

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents as the denoiser knows them: shifted, then scaled."""
        return (latents - self._shift) * self.vae.config.scaling_factor

    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The denoiser's latents of pixels `(B, 3, H, W)` in [-1, 1]: sampled, not the mode, with standard normal `noise` `(B, C, h, w)`."""
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

    def target(self, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """What `predict` ought to give."""
        raise NotImplementedError

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, soft_tokens=None) -> torch.Tensor:
        """The denoiser's own output, float32, for latents `(B, C, h, w)` at times `t` `(B,)` under texts `(B, ...)`.

        `soft_tokens` `(B, layers, K, D)` are read in place of the attached bank's own.
        """
        raise NotImplementedError

    def _carried(self, soft_tokens: torch.Tensor | None) -> dict:
        """Soft tokens as an argument of the denoiser's call."""
        if soft_tokens is None:
            return {}
        if self.tokens is None:
            raise ValueError(
                "predict(soft_tokens=...) needs the hooks that attach() installs: without them diffusers drops the tokens"
            )
        return {carrier(self.denoiser): {KEY: soft_tokens}}

    def free_text_encoders(self) -> None:
        """Drop the text encoders: what is drawn from here on has its texts encoded already."""
        self.text_encoders = nn.ModuleList()
        for name in TEXT_ENCODERS:
            if getattr(self.pipe, name, None) is not None:
                self.pipe.register_modules(**{name: None})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def guided(self) -> bool:
        """Whether drawing takes two predictions a step."""
        return self.guidance_scale > 1 and not self.embeds_guidance

    def empty_text(self, count: int) -> TextEncoding:
        """What guidance reads in place of a prompt."""
        return self.encode_prompts([""] * count)

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding) -> torch.Tensor:
        """`predict` with the conditions that the pipeline names while it draws."""
        return self.predict(x_t, t, text)

    def scheduled(self, steps: int):
        """A scheduler of the checkpoint's own kind and settings, its timesteps set; a used one would raise."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def noise_to_latents(self, noise: torch.Tensor, denoise, steps: int, eta: float = 0.0) -> torch.Tensor:
        """The sampler's latents from standard normal `noise` `(B, C, h, w)`, with gradients; `denoise(x_t, t)` gives the prediction.

        With `eta > 0` (DDIM) noise is `(B, 1 + steps, C, h, w)`: the first starts, the others are what each step adds.
        """
        scheduler, later = self.scheduled(steps), [{}] * steps
        if eta > 0:
            later = [{"eta": eta, "variance_noise": each} for each in noise[:, 1:].unbind(1)]
            noise = noise[:, 0]
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for t, extra in zip(scheduler.timesteps, later, strict=True):
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(denoise(scaled, t.expand(len(x))), t, x, return_dict=False, **extra)[0]
        return x

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(C, h, w)` of one image's latents."""
        side = self.size // self.pipe.vae_scale_factor
        return self.vae.config.latent_channels, side, side

    def prepare(self) -> None:
        """Nothing: the pipeline draws with the live weights."""

    def sampling(self) -> dict:
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
        if self.tokens is None or not self.tokens.enabled:
            return {"soft_tokens": None}
        null = self.tokens.null_branch
        return {"soft_tokens": weights_sha256(self.tokens.bank)} | ({} if null is None else {"null_branch": null})

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int], **settings) -> np.ndarray:
        """One image a prompt, uint8 `(B, H, W, 3)`, by the stock pipeline; row `i` depends on `seeds[i]` alone."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        chosen = (
            {"guidance_scale": self.guidance_scale, "num_inference_steps": self.steps}
            | self._call_settings()
            | settings
        )
        if self.tokens is not None and self.tokens.null_branch is not None and chosen["guidance_scale"] <= 1:
            raise UserError(
                f"these soft tokens have a branch for the empty prompt, which model.guidance_scale={chosen['guidance_scale']} never asks: take one above 1"
            )
        drawn = self.pipe(
            prompt=list(prompts), generator=generators, height=self.size, width=self.size, output_type="np", **chosen
        ).images  # fmt: skip
        return np.rint(drawn * 255).astype(np.uint8)

    def _call_settings(self) -> dict:
        return {}

    def generate(self, prompts: list[str], seeds: list[int], mode: str = "direct", fresh: bool = True) -> Drawing:
        """Draw one image a prompt.

        Raises:
            UserError: `mode` is not `direct`.
        """
        if mode != "direct":
            raise UserError(f"a diffusion model draws in mode direct only, not {mode!r}: set mode=direct")
        return Drawing(self.sample(prompts, seeds), [""] * len(prompts), [0] * len(prompts))

    def blocks(self) -> list[nn.Module]:
        """The denoiser's blocks."""
        raise NotImplementedError


def attention_for_training(model: LatentDiffusion):
    """Plain matrix products in bfloat16 on a CPU, where the fused kernel's backward pass doubles a step's time; else torch's own choice."""
    half = model.dtype == torch.bfloat16 or torch.is_autocast_enabled(model.device.type)
    return sdpa_kernel(SDPBackend.MATH) if half and model.device.type == "cpu" else nullcontext()


class _Config(ConfigMixin):
    """Reads a part's config.json, whatever class it is for."""

    config_name = "config.json"


def load_pipeline(stock_class, path: str, dtype: str, revision: str | None = None, device: str | None = None, **parts):
    """A stock pipeline (or part of one) from a folder or a hub id, frozen, in eval mode, on `device` (`auto`: this process's GPU).

    Raises:
        UserError: it can be neither found nor downloaded, or is not whole; the line names what to do.
    """
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for each in (logging, transformers_logging):
        each.set_verbosity_error()
        each.disable_progress_bar()
    if dtype not in loading.DTYPES:
        raise UserError(f"dtype must be one of {', '.join(loading.DTYPES)}, not {dtype!r}")
    try:
        index = stock_class.load_config(path, revision=revision)
        absent = {name: None for name, part in index.items() if part == [None, None]}  # SD3 without T5
        if loading.WEIGHTLESS.get():
            if issubclass(stock_class, nn.Module):
                return on_meta(stock_class, index, getattr(torch, dtype))
            parts = shapes_of(path, revision, index, getattr(torch, dtype)) | parts
        made = stock_class.from_pretrained(path, revision=revision, dtype=getattr(torch, dtype), **(absent | parts))
    except (OSError, ValueError) as error:
        raise loading.cannot_load(path, error) from error
    return made if loading.WEIGHTLESS.get() else made.to(loading.own_gpu() if device == "auto" else device or "cpu")


def shapes_of(path: str, revision: str | None, index: dict, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules that a pipeline's index names, built from their config files on torch's meta device."""
    import diffusers
    import transformers

    libraries, made = {"diffusers": diffusers, "transformers": transformers}, {}
    for name, entry in index.items():
        kind = getattr(libraries.get(entry[0]), entry[1] or "", None) if isinstance(entry, (list, tuple)) else None
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            read = kind.load_config if entry[0] == "diffusers" else kind.config_class.from_pretrained
            made[name] = on_meta(kind, read(path, subfolder=name, revision=revision), dtype)
    return made


def on_meta(kind: type[nn.Module], config, dtype: torch.dtype) -> nn.Module:
    """A module of diffusers or transformers without values."""
    with torch.device("meta"):
        return (kind.from_config(config) if hasattr(kind, "load_config") else kind(config)).to(dtype)
