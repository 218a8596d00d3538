"""Auto-correlation of a latent with itself, moved (pix2pix-zero, arXiv 2302.03027 section 3.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from t2i_rl.core.errors import UserError
from t2i_rl.gaussianity.moments import Generators, rows


@dataclass(frozen=True)
class AutoCorrelation:
    """How much a latent resembles itself moved by some pixels, over a pyramid.

    It is the sum over pyramid levels, channels and both axes of the squared mean of `x * rolled x`,
    averaged over `rolls` random shifts. Unlike the released code a shift is never 0 and a level is
    rescaled to unit variance after pooling, without which levels count for 1/16 each.

    Args:
        smallest: the side in pixels of the last level.

    Raises:
        UserError: latents that are not `(B, C, h, w)`.
    """

    rolls: int = 1
    smallest: int = 8
    weight: float = 1.0

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        if x.ndim != 4:
            raise UserError("autocorrelation takes latents (B, C, h, w)")
        x = rows(x).view(x.shape)
        return torch.cat([self._of_one(row[None], generator) for row, generator in zip(x, generators, strict=True)])

    def _of_one(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        total = x.new_zeros(1)
        while True:
            for axis in (-2, -1):
                for _ in range(self.rolls):
                    most = max(2, x.shape[axis] // 2)
                    shift = int(torch.randint(1, most, (1,), generator=generator, device=generator.device))
                    correlation = (x * x.roll(shift, axis)).mean(dim=(-2, -1))
                    total = total + correlation.square().sum(dim=1) / self.rolls
            if min(x.shape[-2:]) // 2 < self.smallest:
                return total
            x = 2 * F.avg_pool2d(x, 2)
