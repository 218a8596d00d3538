"""SD3 and FLUX.1 at their true sizes with random weights, made on the device: no hub, no files, no text encoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from t2i_rl.data.encodings import EncodedPairs
from t2i_rl.models.diffusion.base import LatentDiffusion
from t2i_rl.models.diffusion.flow import FlowMatching
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.text_encoders import TextEncoding


@dataclass(frozen=True)
class Shape:
    """A model's settings: of its denoiser and its autoencoder, and how many tokens its texts have."""

    denoiser: dict
    vae: dict
    text_tokens: int


SMALL_VAE = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
# Stages of 128, 256, 512 and 512 channels: 8x8 pixels to one latent of 16 channels.
LARGE_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
SD3_SHAPES = {  # stabilityai/stable-diffusion-3-medium-diffusers; texts: CLIP's 77 tokens and 512 of T5
    "real": Shape(
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        LARGE_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        77 + 512,
    ),
    "tiny": Shape(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        SMALL_VAE,
        7,
    ),
}
FLUX_SHAPES = {  # black-forest-labs/FLUX.1-schnell; texts: 256 tokens of T5
    "real": Shape(
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        },
        LARGE_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        256,
    ),
    "tiny": Shape(
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "guidance_embeds": False,
            "axes_dims_rope": (4, 6, 6),
        },
        SMALL_VAE,
        7,
    ),
}


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules that are made here have their weights there, in that dtype, from seed 0."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def autoencoder(settings: dict) -> AutoencoderKL:
    stages = len(settings["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    )


class RandomSD3(SD3):
    """The adapter around a denoiser and an autoencoder that were made, not loaded; texts come encoded."""

    compact, expand = LatentDiffusion.compact, LatentDiffusion.expand

    def __init__(self, shape: Shape, size: int, device: torch.device, dtype: torch.dtype):
        with made_on(device, dtype):
            denoiser, vae = SD3Transformer2DModel(**shape.denoiser), autoencoder(shape.vae)
        encoders = (f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
        pipe = StableDiffusion3Pipeline(
            transformer=denoiser,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            **dict.fromkeys(encoders),
        )
        FlowMatching.__init__(self, pipe, guidance_scale=4.0, steps=28, size=size, soft_tokens=None)
        self.path, self.revision, self.shape = "random weights", None, shape
        self.requires_grad_(False).eval()


class RandomFlux(Flux):
    """The adapter around a denoiser and an autoencoder that were made, not loaded; texts come encoded."""

    def __init__(self, shape: Shape, size: int, device: torch.device, dtype: torch.dtype):
        with made_on(device, dtype):
            denoiser, vae = FluxTransformer2DModel(**shape.denoiser), autoencoder(shape.vae)
        encoders = (f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2"))
        pipe = FluxPipeline(
            transformer=denoiser,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            **dict.fromkeys(encoders),
        )
        FlowMatching.__init__(self, pipe, guidance_scale=0.0, steps=1, size=size, soft_tokens=None)
        self.path, self.revision, self.shape = "random weights", None, shape
        self.requires_grad_(False).eval()


def random_text(model: RandomSD3 | RandomFlux, rows: int) -> TextEncoding:
    """Normal numbers in the place of encoded texts."""
    settings = model.denoiser.config
    draws = torch.Generator(model.device).manual_seed(1)
    given = {"generator": draws, "device": model.device}
    embeds = torch.randn(rows, model.shape.text_tokens, settings.joint_attention_dim, **given)
    pooled = torch.randn(rows, settings.pooled_projection_dim, **given)
    return TextEncoding(embeds.to(model.dtype), pooled.to(model.dtype))


def random_pairs(model: RandomSD3, rows: int) -> EncodedPairs:
    """Normal numbers in the place of a batch of kept encodings."""
    draws = torch.Generator(model.device).manual_seed(2)
    mean = torch.randn(rows, *model.latent_shape, generator=draws, device=model.device)
    text = model.compact(random_text(model, rows))
    return EncodedPairs(list(range(rows)), [""] * rows, mean, torch.full_like(mean, 0.1), text)
