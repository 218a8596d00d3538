"""The penalty on a latent's power spectrum (MPGR, arXiv 2509.07027 section 3.2).

It is taken in natural order, after a fixed shuffle, or after fresh ones.

White noise has a flat spectrum: every independent bin of its orthonormal Fourier transform is
complex normal, so magnitudes are Rayleigh with mean sqrt(pi)/2. A shuffled vector has a flat
spectrum whatever it looked like, so after fresh shuffles the penalty sees mean and variance only
and its gradient is white noise (docs/gaussianity.md): which order is taken is a choice,
`permutation`.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Weight
from t2i_rl.gaussianity.moments import Generators, rows

# expectations over complex normal bins
EXPECTED = {"magnitude": math.sqrt(math.pi) / 2, "power": 1.0, "log": -0.5772156649015329}
CHOICES = {
    "stat": tuple(EXPECTED),
    "layout": ("flat", "channels"),
    "bins": ("packed", "half", "full"),
    "grouping": ("contiguous", "strided", "random"),
    "permutation": ("none", "fixed", "fresh", "natural+fresh"),
    "distance": ("l1", "l2", "nll"),
}


@cache
def halves(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat indices of a real array's Fourier bins.

    Returns one bin of each conjugate pair, its partner, and the bins that are their own partner,
    which are real.
    """
    index = torch.arange(math.prod(shape)).view(shape)
    partner = index
    for axis, size in enumerate(shape):
        partner = partner.index_select(axis, (-torch.arange(size)) % size)
    index, partner = index.flatten(), partner.flatten()
    return index[index < partner], partner[index < partner], index[index == partner]


def pack(x: torch.Tensor, axes: int = 1) -> torch.Tensor:
    """Real `(..., *shape)` -> complex `(..., D/2)`, in which noise is i.i.d. complex normal.

    The map is orthonormal up to a factor: `|x|^2 = 2 |y|^2`. The last `axes` axes are transformed.
    Bins that are real come in pairs, as real and imaginary part of one (GPER, arXiv 2602.08646).

    Raises:
        UserError: the number of real bins is odd.
    """
    shape = tuple(x.shape[-axes:])
    first, _, real_bins = (indices.to(x.device) for indices in halves(shape))
    if len(real_bins) % 2:
        raise UserError(f"a latent of {'x'.join(map(str, shape))} cannot be packed: its sides must be even")
    bins = torch.fft.fftn(x, dim=tuple(range(-axes, 0)), norm="ortho").flatten(-axes)
    real = bins[..., real_bins].real
    return torch.cat([torch.complex(real[..., ::2], real[..., 1::2]) / math.sqrt(2), bins[..., first]], dim=-1)


def unpack(y: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack`: `(..., D/2)` -> real `(..., *shape)`."""
    first, partner, real_bins = (indices.to(y.device) for indices in halves(tuple(shape)))
    paired, bins = len(real_bins) // 2, y.new_empty(*y.shape[:-1], 2 * y.shape[-1])
    real = torch.view_as_real(y[..., :paired]).flatten(-2) * math.sqrt(2)
    bins[..., real_bins] = torch.complex(real, torch.zeros_like(real))
    bins[..., first], bins[..., partner] = y[..., paired:], y[..., paired:].conj()
    return torch.fft.ifftn(bins.unflatten(-1, tuple(shape)), dim=tuple(range(-len(shape), 0)), norm="ortho").real


@dataclass(frozen=True)
class Spectrum:
    """How far groups of bins are, on average, from what they are expected to be for white noise.

    Args:
        stat: `magnitude` `|X| / sqrt(D)`, `power` (its square) or `log` (the logarithm of that).
        layout: `flat` (one transform of all values) or `channels` (a 2-D one a channel, of latents
            `(B, C, h, w)`).
        bins: `packed` (each independent bin once, real ones paired), `half` (without the real ones)
            or `full` (conjugates twice; MPGR as written).
        group: bins a group; the mean `stat` of each group is compared.
        grouping: `contiguous`, `strided` or `random` (one draw for ever).
        mu: what the mean is compared to; None is the expectation. 0.875 is what the paper prints;
            0.8982 leaves the scale alone under L1.
        distance: `l1`, `l2` (squared), or `nll`: minus the Rayleigh log-density of each magnitude,
            above its least value (group=1).
        permutation: `none` (natural order), `fixed` (one shuffle for ever), `fresh` (`shuffles` new
            ones a call, averaged), `natural+fresh` (both, added).
        floor: distances below it cost nothing: noise itself lies at 0.0923, not at 0 (groups of 16,
            L1).

    Raises:
        UserError: an option outside its choices, or a latent that does not split into whole groups.
    """

    stat: str = "magnitude"
    layout: str = "flat"
    bins: str = "packed"
    group: Count = 16
    grouping: str = "contiguous"
    mu: Weight | None = None
    distance: str = "l1"
    permutation: str = "none"
    shuffles: Count = 1
    floor: Weight = 0.0
    weight: Weight = 1.0

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"spectrum.{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.group < 1 or self.shuffles < 1:
            raise UserError("spectrum.group and spectrum.shuffles must be 1 or more")
        if self.distance == "nll" and (self.group != 1 or self.stat != "magnitude"):
            raise UserError("spectrum.distance=nll judges each magnitude by itself: stat=magnitude, group=1")
        if self.layout == "channels" and self.permutation != "none":
            raise UserError("spectrum.layout=channels looks at pictures in their own order: permutation=none")

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        """Rows draw their shuffles from their own generator."""
        if self.layout == "channels":
            if x.ndim != 4:
                raise UserError("spectrum.layout=channels takes latents (B, C, h, w)")
            return self._hinged(self._distance(rows(x).view(x.shape), axes=2))
        x = rows(x)
        if self.permutation == "none":
            return self._hinged(self._distance(x))
        if self.permutation == "fixed":
            order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0)).to(x.device)
            return self._hinged(self._distance(x[:, order]))
        distances = torch.stack([self._distance(shuffle(x, generators)) for _ in range(self.shuffles)])
        shuffled = self._hinged(distances.mean(dim=0))
        return shuffled + self._hinged(self._distance(x)) if self.permutation == "natural+fresh" else shuffled

    def _distance(self, x: torch.Tensor, axes: int = 1) -> torch.Tensor:
        """Of `(B, *channels, *axes)`, `(B,)`."""
        stat = self._stat(self._bins(x, axes)).flatten(1)
        if self.distance == "nll":
            return (stat.square() - stat.log()).mean(dim=1) - (1 + math.log(2)) / 2
        mu = EXPECTED[self.stat] if self.mu is None else self.mu
        gap = (self._groups(stat) - mu).abs()
        return (gap if self.distance == "l1" else gap.square()).mean(dim=1)

    def _bins(self, x: torch.Tensor, axes: int) -> torch.Tensor:
        if self.bins == "packed":
            return pack(x, axes)
        bins = torch.fft.fftn(x, dim=tuple(range(-axes, 0)), norm="ortho").flatten(-axes)
        return bins if self.bins == "full" else bins[..., halves(tuple(x.shape[-axes:]))[0].to(x.device)]

    def _stat(self, bins: torch.Tensor) -> torch.Tensor:
        if self.stat == "magnitude":
            return bins.abs()
        power = bins.real.square() + bins.imag.square()
        return power if self.stat == "power" else power.log()

    def _groups(self, stat: torch.Tensor) -> torch.Tensor:
        """Means `(B, groups)`; the last group of `half` and `full` may be a smaller one."""
        count = stat.shape[1] // self.group
        if self.bins == "packed" and count * self.group != stat.shape[1]:
            latent = f"a latent of {2 * stat.shape[1]} values"
            raise UserError(f"{latent} does not split into groups of {self.group} bins: take another spectrum.group")
        if self.grouping == "random":
            stat = stat[:, torch.randperm(stat.shape[1], generator=torch.Generator().manual_seed(0)).to(stat.device)]
        in_groups, left_over = stat.split([count * self.group, stat.shape[1] - count * self.group], dim=1)
        if self.grouping == "strided":
            means = in_groups.view(len(stat), self.group, count).mean(dim=1)
        else:
            means = in_groups.view(len(stat), count, self.group).mean(dim=2)
        return torch.cat([means, left_over.mean(dim=1, keepdim=True)], dim=1) if left_over.shape[1] else means

    def _hinged(self, distance: torch.Tensor) -> torch.Tensor:
        return (distance - self.floor).clamp(min=0) if self.floor else distance


def shuffle(x: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Each row `(B, D)` in an order of its own; the global generator is left alone."""
    orders = [torch.randperm(x.shape[1], generator=generator, device=generator.device) for generator in generators]
    return x.gather(1, torch.stack(orders).to(x.device))
