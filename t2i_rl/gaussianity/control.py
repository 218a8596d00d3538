"""The control for a penalty whose gradient is white noise: white noise."""

from dataclasses import dataclass

import torch

from t2i_rl.core.numbers import Weight
from t2i_rl.gaussianity.moments import Generators, rows


@dataclass(frozen=True)
class WhiteNoise:
    """`mean(n x)` with `n` standard normal and drawn anew at every call.

    Its gradient `n / D` knows nothing of x. At the same weight it is as long as that of a packed
    spectrum, `1 / sqrt(D)`.
    """

    weight: Weight = 1.0

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        x = rows(x)
        noise = [torch.randn(x.shape[1], generator=generator, device=generator.device) for generator in generators]
        return (torch.stack(noise).to(x) * x).mean(dim=1)
