"""Whether a latent still looks like Gaussian noise: eight figures, and the bands of true noise.

A penalty's own value does not tell: after a shuffle a checkerboard reads like noise
(docs/gaussianity.md).
"""

from dataclasses import dataclass
from functools import cache

import torch

from t2i_rl.gaussianity.moments import rows
from t2i_rl.gaussianity.spectrum import Spectrum

DRAWS = 1000
TAILS = (0.005, 0.995)
SPECTRUM = Spectrum(bins="half", weight=25.0)


def measures(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures `(B,)` of latents `(B, ...)`; some need unpacked ones `(B, C, h, w)`.

    mean, std, kurtosis (3 for a Gaussian), ks (Kolmogorov-Smirnov's distance times sqrt(D)), lag1_x
    and lag1_y (correlation of neighbours), max_power (of any bin of the channels' 2-D spectra),
    spectrum (25 times the natural-order spectral penalty).
    """
    flat = rows(x.detach())
    mean, std = flat.mean(dim=1), flat.std(dim=1, correction=0)
    standard = (flat - mean[:, None]) / std[:, None]
    figures = {"mean": mean, "std": std, "kurtosis": standard.pow(4).mean(dim=1), "ks": _ks(flat)}
    if x.ndim == 4:
        grid = standard.view(x.shape)
        figures["lag1_x"] = (grid[..., 1:] * grid[..., :-1]).mean(dim=(1, 2, 3))
        figures["lag1_y"] = (grid[..., 1:, :] * grid[..., :-1, :]).mean(dim=(1, 2, 3))
        figures["max_power"] = torch.fft.fft2(flat.view(x.shape), norm="ortho").abs().square().amax(dim=(1, 2, 3))
    figures["spectrum"] = SPECTRUM.weight * SPECTRUM(flat, ())
    return figures


def _ks(flat: torch.Tensor) -> torch.Tensor:
    ordered, count = flat.sort(dim=1).values, flat.shape[1]
    expected = torch.special.ndtr(ordered)
    steps = torch.arange(count + 1, device=flat.device) / count
    gap = torch.maximum((steps[1:] - expected).amax(dim=1), (expected - steps[:-1]).amax(dim=1))
    return gap * count**0.5


@cache
def bands(shape: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """Where 99 % of true noise of one latent's shape lies, figure by figure, by 1000 draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [measures(torch.randn(1, *shape, generator=generator)) for _ in range(DRAWS)]
    values = {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}
    edges = {name: torch.quantile(values_of_name, torch.tensor(TAILS)) for name, values_of_name in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in edges.items()}


@dataclass(frozen=True)
class GaussianityReport:
    """`figures` `(B,)` by name beside the `bands` of true noise of the same shape."""

    figures: dict[str, torch.Tensor]
    bands: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, x: torch.Tensor) -> "GaussianityReport":
        """Of latents `(B, C, h, w)`, or `(B, D)` where there is no image to them."""
        return cls({name: value.cpu() for name, value in measures(x).items()}, bands(tuple(x.shape[1:])))

    def inside(self) -> dict[str, torch.Tensor]:
        """Whether each latent lies within the band, `(B,)` bool by figure."""
        return {
            name: (value >= self.bands[name][0]) & (value <= self.bands[name][1])
            for name, value in self.figures.items()
        }
