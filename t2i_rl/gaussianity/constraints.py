"""Sets that a latent is put back into after every step: a sphere (DOODL), or white noise (GPER)."""

import math
from dataclasses import dataclass

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count
from t2i_rl.gaussianity.moments import rows
from t2i_rl.gaussianity.spectrum import pack, unpack

BISECTIONS = 64
EMPTY = 1e-6  # of the greatest bin: what float32 leaves where a pattern has nothing


@dataclass(frozen=True)
class Renorm:
    """Back to a norm (DOODL, arXiv 2303.13703).

    Args:
        to: `gaussian` is the norm `sqrt(D)`, `initial` the one that each row began with.
        center: back to mean 0 first.
        project_gradient: put every gradient onto the set too.

    Raises:
        UserError: another `to`.
    """

    to: str = "gaussian"
    center: bool = False
    project_gradient: bool = False

    def __post_init__(self):
        if self.to not in ("gaussian", "initial"):
            raise UserError(f"renorm.to must be gaussian or initial, not {self.to!r}")

    def __call__(self, x: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Latents `(B, ...)` and what they began as -> latents in the set."""
        if self.center:
            x = x - rows(x).mean(dim=1).view(-1, *[1] * (x.ndim - 1)).to(x)
        norms = rows(x).norm(dim=1)
        gaussian_norms = torch.full_like(norms, math.sqrt(x[0].numel()))
        target_norms = rows(initial).norm(dim=1) if self.to == "initial" else gaussian_norms
        return x * (target_norms / norms).view(-1, *[1] * (x.ndim - 1)).to(x)


@dataclass(frozen=True)
class WhitenedNoise:
    """The nearest latent whose packed spectrum is white, block by block (GPER, arXiv 2602.08646).

    In every block of B bins `|y|_1 = B sqrt(pi)/2` and `|y|_2^2 = B`. Phases are kept; where a bin
    is empty all are equally near, and it gets one of its own by a fixed draw (the same one for all
    would add up to a spike). Gaussian noise is moved little: its cosine with its projection is
    0.989. Zeros, a gradient that has vanished, stay zeros.

    Args:
        block: bins a block, B; D must be a multiple of 2B.
        project_gradient: put every gradient onto the set too, which gives all frequencies the same
            share of a step.

    Raises:
        UserError: a latent that does not split into whole blocks.
    """

    block: Count = 16
    project_gradient: bool = True

    def __call__(self, x: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        y = pack(rows(x).double())
        if y.shape[1] % self.block:
            values = 2 * y.shape[1]
            raise UserError(
                f"a latent of {values} values does not split into blocks of {self.block} bins: take another block"
            )
        y = y.unflatten(1, (-1, self.block))
        magnitude = y.abs()
        greatest = magnitude.amax((1, 2), keepdim=True)
        turns = 2 * math.pi * torch.rand(y.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        any_phase = torch.polar(torch.ones_like(turns), turns).to(y.device)
        phase = torch.where(magnitude > EMPTY * greatest, y / magnitude.clamp(min=1e-300), any_phase)
        projected = (project_block(magnitude) * phase * (greatest > 0)).flatten(1)
        return unpack(projected, (x[0].numel(),)).view(x.shape).to(x)


def project_block(w: torch.Tensor) -> torch.Tensor:
    """Magnitudes `(..., B)` -> the nearest non-negative ones of white noise.

    These have `|w|_1 = B sqrt(pi)/2` and `|w|_2^2 = B`. They come by soft thresholding and
    rescaling: the threshold solves `(sum (w - l)_+)^2 = (pi/4) B sum (w - l)_+^2`, whose sides'
    ratio falls as `l` grows. Ties, for which there is no solution, are broken by a millionth.
    """
    block = w.shape[-1]
    ramp = torch.linspace(0, 1, block, dtype=w.dtype, device=w.device)
    w = w + 1e-6 * ramp * w.amax(-1, keepdim=True).clamp(min=1e-6)
    high = w.amax(-1, keepdim=True)
    low = high - 1e3 * (high - w.amin(-1, keepdim=True) + high * 1e-9)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = (w - middle).clamp(min=0)
        flat = above.sum(-1, keepdim=True).square() > math.pi / 4 * block * above.square().sum(-1, keepdim=True)
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    above = (w - low).clamp(min=0)
    return above * (block * math.sqrt(math.pi) / 2 / above.sum(-1, keepdim=True))
