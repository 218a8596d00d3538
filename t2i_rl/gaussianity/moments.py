"""Penalties on a latent's values: moments, KL, norm, kurtosis (MPGR, arXiv 2509.07027 section 3).

ReNO and DNO have some of them too.

Every penalty is called with latents `(B, ...)` and one generator a row, and gives `(B,)` without
its `weight`; rows never meet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Weight

ABOUT = ("zero", "mean", "mean and scale")
Generators = Sequence[torch.Generator]


def rows(x: torch.Tensor) -> torch.Tensor:
    """Latents `(B, ...)` as `(B, D)`, in float32 at least.

    Sums of half precisions overflow: `|x|^2` is 65,536 at FLUX's 512 pixels.
    """
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def normal_moment(n: int) -> float:
    """The n-th moment of N(0, 1): 0 for odd n, (n - 1)!! for even."""
    return float(math.prod(range(n - 1, 0, -2))) if n % 2 == 0 else 0.0


@dataclass(frozen=True)
class Moment:
    """`| |m_n|^(1/n) - mu_n^(1/n) |^p` (MPGR, the equation of L_n).

    `m_n` is the n-th moment of a row's values, `mu_n` that of N(0, 1).

    Args:
        root: take n-th roots, which puts all orders on the scale of x.
        about: `zero` (raw, as MPGR), `mean` (central), or `mean and scale` (standardised).
        smooth: added under the root of an odd order, as `(m^2 + smooth)^(1/2n)`: its slope at zero
            is infinite without.

    Raises:
        UserError: an order below 1, an unknown `about`, or a root of an odd order above 1 without
            `smooth`.
    """

    n: Count
    root: bool = True
    about: str = "zero"
    p: Count = 1
    smooth: Weight = 0.0
    weight: Weight = 1.0

    def __post_init__(self):
        if self.n < 1 or self.p not in (1, 2) or self.about not in ABOUT:
            raise UserError(f"a moment has n of 1 or more, p of 1 or 2, and about one of {', '.join(ABOUT)}")
        if self.root and self.n % 2 and self.n > 1 and not self.smooth:
            why = "has an infinite slope at 0, where Gaussian noise is"
            raise UserError(f"the {self.n}-th root {why}: root=false, or smooth=1e-6")

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        x = rows(x)
        if self.about != "zero":
            x = x - x.mean(dim=1, keepdim=True)
        if self.about == "mean and scale":
            x = x / x.square().mean(dim=1, keepdim=True).sqrt()
        moment, expected = x.pow(self.n).mean(dim=1), normal_moment(self.n)
        if self.root and self.smooth:
            moment, expected = (moment.square() + self.smooth).pow(0.5 / self.n), expected ** (1 / self.n)
        elif self.root:
            moment, expected = moment.abs().pow(1 / self.n), expected ** (1 / self.n)
        return (moment - expected).abs().pow(self.p)


@dataclass(frozen=True)
class KL:
    """KL in nats an element to N(0, 1), of the normal with a row's mean m and variance v.

    It is `(m^2 + v - ln v - 1) / 2`.
    """

    weight: Weight = 1.0

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        x = rows(x)
        mean, variance = x.mean(dim=1), x.var(dim=1, correction=0)
        return (mean.square() + variance - variance.log() - 1) / 2


@dataclass(frozen=True)
class ChiNorm:
    """Minus the log-density of a Gaussian's norm (ReNO, arXiv 2406.04312 eq. 4).

    It is `|x|^2 / 2 - (D - 1) ln |x|`, above its least value.
    """

    weight: Weight = 1.0

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        x = rows(x)
        freedom, squares = x.shape[1] - 1, x.square().sum(dim=1)
        return (squares - freedom - freedom * (squares / freedom).log()) / 2
