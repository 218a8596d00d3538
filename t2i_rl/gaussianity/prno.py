"""How probable mean and covariance of a latent's blocks are (DNO, arXiv 2405.18881 section 4)."""

import math
from dataclasses import dataclass

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Weight, Whole
from t2i_rl.gaussianity.moments import Generators, rows
from t2i_rl.gaussianity.spectrum import shuffle


@dataclass(frozen=True)
class PRNO:
    """Minus the log of concentration bounds on mean and covariance of blocks of `k` values.

    The bounds are on `M1 = |mean of blocks|` and `M2 = |covariance - I|` (spectral norm). They are
    averaged over `shuffles` orders, to which the natural order is added with the weight of all of
    them (`sequential`), as released. Never below `4 ln 2` (`2 ln 2` for one of the two): both
    bounds are cut off at a half, where the gradient is exactly zero.

    Raises:
        UserError: no order is looked at.
    """

    k: Count = 4
    shuffles: Whole = 100
    sequential: bool = True
    weight: Weight = 1.0

    def __post_init__(self):
        if self.k < 1 or self.shuffles < 0 or not (self.shuffles or self.sequential):
            raise UserError("prno takes k of 1 or more, and shuffles of 1 or more or sequential=true")

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        x = rows(x)
        total = self._improbability(x) if self.sequential else 0
        if self.shuffles:
            shuffled = [self._improbability(shuffle(x, generators)) for _ in range(self.shuffles)]
            total = total + torch.stack(shuffled).mean(dim=0)
        return total

    def _improbability(self, x: torch.Tensor) -> torch.Tensor:
        m = x.shape[1] // self.k
        blocks = x[:, : m * self.k].view(len(x), m, self.k)
        m1 = blocks.mean(dim=1).square().sum(dim=1)
        covariance = blocks.mT @ blocks / m
        m2 = torch.linalg.matrix_norm(covariance - torch.eye(self.k, device=x.device, dtype=x.dtype), ord=2)
        of_mean = -m * m1 / (2 * self.k)
        of_covariance = -(m / 2) * ((1 + m2).sqrt() - 1 - math.sqrt(self.k / m)).clamp(min=0).square()
        return -(of_mean.clamp(max=-math.log(2)) + of_covariance.clamp(max=-math.log(2)))
