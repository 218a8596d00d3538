"""From noise to an image with gradients all the way: what optimising the noise goes through."""

from collections.abc import Callable

import torch
from diffusers import ModelMixin
from torch.utils.checkpoint import checkpoint

from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding
from t2i_rl.models.diffusion.guidance import guided


def noise_to_image(
    model: LatentDiffusion,
    noise: torch.Tensor,
    text: TextEncoding,
    empty: TextEncoding | None = None,
    eta: float = 0.0,
    checkpointing: bool = False,
    last_step_noise: bool = True,
) -> torch.Tensor:
    """Float32 pixels `(B, 3, H, W)` in [0, 1] of standard normal `noise`.

    The model draws in its own number of steps and at its own guidance. This is the stock pipeline's
    own computation, without its `no_grad`, its offloading hooks and its safety checker; a test
    holds them equal.

    Args:
        noise: float32 `(B, C, h, w)`, or `(B, 1 + steps, C, h, w)` with `eta`.
        empty: what guidance reads in place of the prompt; needed where the model is `guided`.
        last_step_noise: with `eta`, whether the last step adds its noise too: the stock pipeline
            does, DNO's released sampler does not.
        checkpointing: what is between the ends of steps or blocks is computed again on the way
            back; it goes with `enable_checkpointing`.

    Raises:
        ValueError: noise in half precision: most of an optimiser's steps would be rounded away.
        UserError: latents or pixels are not finite.
    """
    if noise.dtype not in (torch.float32, torch.float64):
        why = "in half precision most of a step is rounded away"
        raise ValueError(f"noise is optimised in float32, not {noise.dtype}: {why}")

    def predicted(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not model.guided:
            return model.denoise(x_t, t, text, empty=False)
        unconditional = model.denoise(x_t, t, empty, empty=True)
        return guided(model.denoise(x_t, t, text, empty=False), unconditional, model.guidance_scale)

    def by_its_ends(function: Callable) -> Callable:
        """The function, of which the graph keeps what goes in and what comes out."""
        return (lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)) if checkpointing else function

    predict = by_its_ends(predicted) if model.steps > 1 else predicted
    decode = model.decode_latents if _by_blocks(model.vae) else by_its_ends(model.decode_latents)
    latents = model.noise_to_latents(noise, predict, model.steps, eta, last_step_noise)
    return (decode(latents) / 2 + 0.5).clamp(0, 1)


def enable_checkpointing(model: LatentDiffusion) -> None:
    """Keep the ends of blocks and not what is between, where a part runs once.

    These are the denoiser of one step, and an autoencoder that can do so. Several steps are kept by
    their ends instead, by `noise_to_image(checkpointing=True)`.
    """
    if model.steps == 1:
        model.denoiser.enable_gradient_checkpointing()
    if _by_blocks(model.vae):
        model.vae.enable_gradient_checkpointing()


def _by_blocks(part: ModelMixin) -> bool:
    """Whether diffusers can compute the blocks of this part again, one by one."""
    return part._supports_gradient_checkpointing
