"""From noise to a picture with gradients all the way: what optimising the noise goes through."""

import torch
from torch.utils.checkpoint import checkpoint

from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding


def noise_to_image(
    model: LatentDiffusion,
    noise: torch.Tensor,
    text: TextEncoding,
    empty: TextEncoding | None = None,
    eta: float = 0.0,
    checkpointing: bool = False,
    last_step_noise: bool = True,
) -> torch.Tensor:
    """Float32 pixels `(B, 3, H, W)` in [0, 1] of standard normal float32 `noise` `(B, C, h, w)` (or `(B, 1 + steps, C, h, w)` with `eta`),
    in the model's own number of steps and at its own guidance.

    The stock pipeline's own computation, without its `no_grad`, its offloading hooks and its safety checker; a test holds them equal.

    Args:
        empty: what guidance reads in place of the prompt; needed where the model is `guided`.
        last_step_noise: with `eta`, whether the last step adds its noise too: the stock pipeline does, DNO's released
            sampler does not.
        checkpointing: with `enable_checkpointing`: compute what is between the ends of steps or blocks again on the way back.

    Raises:
        ValueError: noise in half precision: most of an optimiser's steps would be rounded away.
        UserError: latents or pixels are not finite.
    """
    if noise.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"noise is optimised in float32, not {noise.dtype}: in half precision most of a step is rounded away"
        )

    def predicted(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not model.guided:
            return model.denoise(x_t, t, text, empty=False)
        without = model.denoise(x_t, t, empty, empty=True)
        return without + model.guidance_scale * (model.denoise(x_t, t, text, empty=False) - without)

    def kept(function, wanted: bool):
        return (
            (lambda *given: checkpoint(function, *given, use_reentrant=False)) if checkpointing and wanted else function
        )

    latents = model.noise_to_latents(noise, kept(predicted, model.steps > 1), model.steps, eta, last_step_noise)
    return (kept(model.decode_latents, not _by_blocks(model.vae))(latents) / 2 + 0.5).clamp(0, 1)


def enable_checkpointing(model: LatentDiffusion) -> None:
    """Keep the ends of each block and not what is between: of the denoiser that runs once, and of an autoencoder that can.

    Several steps are kept by their ends instead, by `noise_to_image(checkpointing=True)`.
    """
    if model.steps == 1:
        model.denoiser.enable_gradient_checkpointing()
    if _by_blocks(model.vae):
        model.vae.enable_gradient_checkpointing()


def _by_blocks(part) -> bool:
    return getattr(part, "_supports_gradient_checkpointing", False)
