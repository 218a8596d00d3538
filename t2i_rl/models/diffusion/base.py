"""What text-to-image denoisers of diffusers have in common: texts, latents, noise, prediction, and pictures from the stock pipeline."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from inspect import signature

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2i_rl.core.contracts import Generation, ImageModel
from t2i_rl.core.encoder_texts import Reader, Reading
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_finite
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.pixels import OVERFLOW, to_bytes
from t2i_rl.models.diffusion.pipelines import INDEX, read_config
from t2i_rl.models.diffusion.pipelines import load_pipeline as load_pipeline
from t2i_rl.models.diffusion.schedulers import read_scheduler
from t2i_rl.models.diffusion.soft_tokens import Attached, SoftTokens
from t2i_rl.models.diffusion.splice import EMPTY, KEY, carrier
from t2i_rl.models.diffusion.text_encoders import TEXT_ENCODERS, TextEncoding, tokenizers_of


class LatentDiffusion(ImageModel):
    """A stock pipeline as a module: the parts that learn or encode are submodules, `pipe` is how pictures are drawn.

    A subclass names the name of its denoiser there, how noise is added and what is predicted. `tokens` is the bank at work in the
    denoiser (`attach`), None without; times `t` count from 0 (clean) to 1000 everywhere.
    """

    family = "diffusion"
    denoiser_name = "unet"
    encoders = {"tokenizer": "CLIP"}  # what each of the pipeline's tokenizers is for
    embeds_guidance = False  # told to the denoiser, rather than taken from two predictions

    def __init__(self, pipe, guidance_scale: float, steps: int, size: int | None, soft_tokens: str | None):
        super().__init__()
        self.pipe = pipe
        self.guidance_scale, self.steps = guidance_scale, steps
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.vae = pipe.vae
        self.vae.decoder.register_forward_hook(check_decoded)
        self.text_encoders = nn.ModuleList(
            part for name in TEXT_ENCODERS if (part := getattr(pipe, name, None)) is not None
        )
        self.size = size or self.denoiser.config.sample_size * pipe.vae_scale_factor
        pipe.set_progress_bar_config(disable=True)
        self.attached: Attached | None = None
        if soft_tokens:
            self.attach(SoftTokens.load(soft_tokens).requires_grad_(False))

    @classmethod
    def text_reader(cls, settings: dict) -> Reader:
        """How a config's checkpoint reads prompts; its tokenizers and config files are read, no weights.

        Raises:
            UserError: they can be neither found nor downloaded, or do not fit each other; the line names what to do.
        """
        path, revision = settings["path"], settings.get("revision")
        defaults = {name: argument.default for name, argument in signature(cls.__init__).parameters.items()}
        tokenizers = tokenizers_of(path, revision, read_config(path, None, revision, INDEX))
        return cls.reader_of(tokenizers, defaults | dict(settings))

    @classmethod
    def reader_of(cls, tokenizers: dict, settings: dict) -> Reader:
        """How prompts are read with these tokenizers, by name."""
        readings = [cls.reading_of(cls.encoders[name], tokenizer, settings) for name, tokenizer in tokenizers.items()]
        return Reader(cls.__name__, str(settings["path"]), readings)

    @classmethod
    def reading_of(cls, encoder: str, tokenizer, settings: dict) -> Reading:
        """CLIP's window is its tokenizer's, any other's is `max_sequence_length`, as the pipelines have it."""
        limit = tokenizer.model_max_length if encoder == "CLIP" else settings["max_sequence_length"]
        return Reading(encoder, tokenizer, limit)

    @cached_property
    def reader(self) -> Reader:
        """See `text_reader`; of the pipeline as it is loaded."""
        tokenizers = {name: getattr(self.pipe, name) for name in self.encoders}
        present = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
        return self.reader_of(present, vars(self))

    @classmethod
    def image_size(cls, settings: dict) -> int:
        """The side in pixels of what a config's checkpoint draws; reads its config files, no weights.

        Raises:
            UserError: they can be neither found nor downloaded, or are of a kind that nothing trains (`check_files`).
        """
        cls.check_files(settings)
        path, revision = settings["path"], settings.get("revision")
        denoiser, vae = (read_config(path, part, revision) for part in (cls.denoiser_name, "vae"))
        stages = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        return settings.get("size") or denoiser["sample_size"] * 2 ** (len(stages) - 1)

    @classmethod
    def check_files(cls, settings: Mapping) -> None:
        """Refuse a config's checkpoint of another process than this class trains; no weights are read.

        Raises:
            UserError: its scheduler is of another process, its autoencoder's latents are normalised channel by channel,
                or its files can be neither found nor downloaded.
        """
        path, where = settings["path"], {"revision": settings.get("revision")}
        cls.check_scheduler(path, read_scheduler(path, **where), settings)
        vae = settings.get("vae")
        config = read_config(vae) if vae else read_config(path, "vae", **where)
        if config.get("latents_mean") is not None:
            raise UserError(
                f"{vae or path}: this autoencoder's config has latents_mean, a shift of each channel that training and "
                "noise optimisation here do not know; take another model.vae"
            )

    @classmethod
    def check_scheduler(cls, path: str, config: Mapping, settings: Mapping) -> None:
        """Refuse a scheduler's config, as `schedulers.read_scheduler` reads it.

        Raises:
            UserError: it is of another process than this class trains.
        """
        raise NotImplementedError

    @classmethod
    def check_soft_tokens(cls, settings: dict) -> None:
        """Whether `soft_tokens` is a file of this architecture; reads config files, no weights.

        Raises:
            UserError: it is no such file, or was made for another class of denoisers.
        """
        bank = SoftTokens.load(settings["soft_tokens"])
        denoiser = read_config(settings["path"], cls.denoiser_name, settings.get("revision"))
        if denoiser["_class_name"] != bank.spec.architecture:
            raise UserError(
                f"model.soft_tokens={settings['soft_tokens']} are for {bank.spec.architecture}, not for "
                f"{denoiser['_class_name']}: "
                "take the model that they were trained on"
            )

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
        """What has to be kept of texts, without padding that is known beforehand; rows stay rows."""
        return {name: part for name, part in (("embeds", text.embeds), ("pooled", text.pooled)) if part is not None}

    def expand(self, kept: dict[str, torch.Tensor]) -> TextEncoding:
        """What `compact` was given."""
        return TextEncoding(kept["embeds"], kept.get("pooled"))

    def posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation `(B, C, h, w)`, float32, of the autoencoder's latents of pixels `(B, 3, H, W)` in [-1, 1].

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

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What `predict` ought to give at times `t` `(B,)`, in the denoiser's own parametrisation."""
        raise NotImplementedError

    def predict(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        text: TextEncoding,
        soft_tokens: torch.Tensor | None = None,
        empty: bool | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoiser's own output, float32, for latents `(B, C, h, w)` at times `t` `(B,)` under texts `(B, ...)`.

        Args:
            soft_tokens: `(B, layers, K, D)`, read in place of the attached bank's own.
            empty: whose texts stand for guidance's empty prompt: none, all, or a mask `(B,)`. An attached bank with a
                branch for the empty prompt has to be told; no other asks.

        Raises:
            UserError: the attached bank has a branch for the empty prompt, and `empty` does not say who reads it.
        """
        raise NotImplementedError

    def _carried(self, soft_tokens: torch.Tensor | None, empty: bool | torch.Tensor | None = None) -> dict:
        """Soft tokens, or whose texts are the empty prompt's, as an argument of the denoiser's call."""
        if soft_tokens is None:
            if self.attached is None or not self.attached.enabled or not self.attached.tells_empty_apart:
                return {}
            if empty is None:
                raise UserError(
                    "these soft tokens have a branch for the empty prompt: predict(..., empty=False) for prompts, True "
                    "for the empty one, or a mask of the rows"
                )
            return {carrier(self.denoiser): {EMPTY: empty}}
        if self.attached is None:
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

    def denoise(
        self, x_t: torch.Tensor, t: torch.Tensor, text: TextEncoding, empty: bool | torch.Tensor | None = None
    ) -> torch.Tensor:
        """`predict` with the conditions that the pipeline names while it draws."""
        return self.predict(x_t, t, text, empty=empty)

    def scheduled(self, steps: int):
        """A scheduler of the checkpoint's own kind and settings, its timesteps set; a used one would raise."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def noise_to_latents(
        self, noise: torch.Tensor, denoise, steps: int, eta: float = 0.0, last_step_noise: bool = True
    ) -> torch.Tensor:
        """The sampler's latents from standard normal `noise` `(B, C, h, w)`, with gradients; `denoise(x_t, t)` gives the prediction.

        With `eta > 0` (DDIM) noise is `(B, 1 + steps, C, h, w)`: the first starts, the others are what each step adds.
        Without `last_step_noise` the last step adds none and goes the whole way along its direction, as eta 0 does.
        """
        scheduler, later = self.scheduled(steps), [{}] * steps
        if eta > 0:
            later = [{"eta": eta, "variance_noise": each} for each in noise[:, 1:].unbind(1)]
            if not last_step_noise:
                later[-1] = {"eta": 0.0}
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
        if self.attached is None or not self.attached.enabled:
            return {"soft_tokens": None}
        null = self.attached.null_branch
        return {"soft_tokens": weights_sha256(self.attached.bank)} | ({} if null is None else {"null_branch": null})

    @torch.no_grad()
    def sample(self, prompts: list[str], seeds: list[int], **settings) -> np.ndarray:
        """One image a prompt, uint8 `(B, H, W, 3)`, by the stock pipeline; row `i` depends on `seeds[i]` alone.

        Raises:
            UserError: a latent or a pixel is not finite, or guidance is off and the soft tokens are made for it.
        """
        self.reader.check(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        chosen = (
            {"guidance_scale": self.guidance_scale, "num_inference_steps": self.steps}
            | self._call_settings()
            | settings
        )
        unasked = chosen["guidance_scale"] <= 1 or self.embeds_guidance
        if self.attached is not None and self.attached.tells_empty_apart and unasked:
            raise UserError(
                "these soft tokens have a branch for the empty prompt, which this model never asks at "
                f"model.guidance_scale={chosen['guidance_scale']}: take one above 1, or tokens without such a branch"
            )
        drawn = self.pipe(
            prompt=list(prompts), generator=generators, height=self.size, width=self.size, output_type="np", **chosen
        ).images  # fmt: skip
        return to_bytes(torch.from_numpy(drawn).permute(0, 3, 1, 2))

    def _call_settings(self) -> dict:
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
    """A hook of the autoencoder's decoder, through which every picture comes: a later clamp makes infinity white.

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


def attention_for_training(model: LatentDiffusion):
    """Plain matrix products in bfloat16 on a CPU, where the fused kernel's backward pass doubles a step's time; else torch's own choice."""
    half = model.dtype == torch.bfloat16 or torch.is_autocast_enabled(model.device.type)
    return sdpa_kernel(SDPBackend.MATH) if half and model.device.type == "cpu" else nullcontext()
