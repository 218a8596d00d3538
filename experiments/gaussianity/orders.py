"""In which order is the spectrum taken? What a fixed shuffle, fresh ones, the natural order and both see, and do.

    python experiments/gaussianity/orders.py                  # about two minutes on a CPU; writes orders.md

1. 25 times the penalty on latents that are and are not noise. 2. The part of its gradient across the radius against
the number of shuffles averaged. 3. Climbing a reward (the projection on a smooth pattern), reward steps of equal size
in all arms and a regulariser's of the same size: what reward is reached and what is left of the noise, beside the
control with white noise where the spectrum's gradient would be. Each arm with MPGR's moments, and with mean and length
put back after every step instead.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from checkerboard import SHAPE, checkerboard

from t2i_rl.core.files import write_atomic
from t2i_rl.gaussianity.constraints import Renorm, WhitenedNoise
from t2i_rl.gaussianity.control import WhiteNoise
from t2i_rl.gaussianity.health import measures
from t2i_rl.gaussianity.moments import Moment
from t2i_rl.gaussianity.regularizer import Regularizer
from t2i_rl.gaussianity.spectrum import Spectrum
from t2i_rl.study.tables import markdown, mean_cell

HERE = Path(__file__).parent
SMALL = (4, 64, 64)
FIGURES = ("reward", "std", "lag1_x", "kurtosis", "max_power", "spectrum")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def standard(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / x.std(correction=0)


def latents() -> dict[str, torch.Tensor]:
    """Latents of mean 0 and standard deviation 1 (but for the last), `(1, 16, 64, 64)`."""
    noise = torch.randn(1, *SHAPE, generator=generator(0))
    smooth = F.interpolate(torch.randn(1, 16, 8, 8, generator=generator(1)), 64, mode="bicubic")
    uniform = torch.rand(1, *SHAPE, generator=generator(2)) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log()
    inputs = {
        "Gaussian noise": noise,
        "checkerboard of 1 px": checkerboard(1),
        "checkerboard of 8 px": checkerboard(8),
        "low frequencies alone": smooth,
        "0.8 low frequencies + 0.6 noise": 0.8 * standard(smooth) + 0.6 * noise,
        "sorted Gaussian values": noise.flatten().sort().values.view(1, *SHAPE),
        "white, Laplacian values": laplace,
    }
    return {name: standard(x) for name, x in inputs.items()} | {"1.05 x Gaussian noise": 1.05 * standard(noise)}


def penalties() -> list[str]:
    rows = []
    for name, x in latents().items():
        spectra = [Spectrum(permutation=order, shuffles=10) for order in ("none", "fixed", "fresh")]
        rows.append([name, *(f"{25 * spectrum(x, [generator(0)]).item():.2f}" for spectrum in spectra)])
    return [
        "## What it sees",
        "",
        "25 x the penalty (packed bins, groups of 16); a fresh shuffle's is the mean of 10.",
        "",
        *markdown(["latent", "natural order", "fixed shuffle", "fresh shuffles"], rows, names=1),
    ]


def gradients() -> list[str]:
    names, starts = list(latents())[:3], list(latents().values())[:3]
    rows = []
    for count in (1, 4, 16, 64):
        norms = [across_radius(Spectrum(bins="full", permutation="fresh", shuffles=count), x) for x in starts]
        rows.append([str(count), *(f"{norm:.4f}" for norm in norms), f"{0.0905 / count**0.5:.4f}"])
    return [
        "## What its gradient is",
        "",
        "Norm of the gradient of 25 x the penalty (all bins, as published) across the radius, on three latents; "
        "0.0905 / sqrt(K) is white noise averaged.",
        "",
        *markdown(["shuffles K", *names, "0.0905 / sqrt(K)"], rows, names=0),
    ]


def across_radius(spectrum: Spectrum, x: torch.Tensor) -> float:
    """The norm of what its gradient has across the direction from the origin."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(25 * spectrum(leaf, [generator(0)]).sum(), leaf)
    radius = (x / x.norm()).flatten()
    return (gradient.flatten() - (gradient.flatten() @ radius) * radius).norm().item()


def arms() -> dict[str, Regularizer]:
    """By name: each with the moments alone beside it, and again with the length put back after every step."""
    moments = {"1": Moment(1), "2": Moment(2)}
    spectra = {
        "fixed shuffle": Spectrum(permutation="fixed", weight=25.0),
        "fresh shuffle, K = 1": Spectrum(permutation="fresh", weight=25.0),
        "fresh shuffles, K = 16": Spectrum(permutation="fresh", shuffles=16, weight=25.0),
        "control: white noise": WhiteNoise(weight=25.0),
        "natural order": Spectrum(weight=25.0),
        "natural order, hinged": Spectrum(weight=25.0, floor=0.0923),
        "natural + fresh": Spectrum(permutation="natural+fresh", weight=25.0),
    }
    regularizers = {"no regulariser": Regularizer(), "moments alone": Regularizer(moments)}
    for name, term in spectra.items():
        regularizers[name] = Regularizer(moments | {"s": term})
        regularizers[f"{name}; length put back"] = Regularizer({"s": term}, Renorm(center=True))
    regularizers["projected onto whitened noise"] = Regularizer(constraint=WhitenedNoise(project_gradient=False))
    return regularizers


def climb(regularizer: Regularizer, seed: int, steps: int, rms: float) -> dict[str, float]:
    """Nesterov steps in which the reward has the stated rms before momentum, and the regulariser as much again.

    Returns the reward that is reached, and the figures of what is left of the noise.
    """
    x = torch.randn(1, *SMALL, generator=generator(seed))
    pattern = F.interpolate(torch.randn(1, 4, 8, 8, generator=generator(1000 + seed)), 64, mode="bicubic")
    pattern, own = pattern / pattern.norm(), [generator(2000 + seed)]
    velocity, start, length = torch.zeros_like(x), x.clone(), rms * x.numel() ** 0.5
    for _ in range(steps):
        total = -length * pattern
        if regularizer.terms:
            leaf = x.clone().requires_grad_()
            (of_penalty,) = torch.autograd.grad(regularizer(leaf, own)[0].sum(), leaf)
            total = total + length * of_penalty / of_penalty.norm().clamp(min=1e-12)
        velocity = 0.9 * velocity + total
        x = x - (total + 0.9 * velocity)
        if regularizer.constraint is not None:
            x = regularizer.constraint(x, start)
    return {"reward": (x * pattern).sum().item(), **{name: value.item() for name, value in measures(x).items()}}


def climbs(seeds: int, steps: int, rms: float) -> list[str]:
    rows = []
    for name, regularizer in arms().items():
        runs = [climb(regularizer, seed, steps, rms) for seed in range(seeds)]
        rows.append([name, *(mean_cell([run[figure] for run in runs], ".3g") for figure in FIGURES)])
        print(" | ".join(rows[-1]), flush=True)
    return [
        "## What it does",
        "",
        f"{steps} steps of rms {rms} before momentum, D = {torch.Size(SMALL).numel():,}, {seeds} seeds (noise, pattern "
        "and shuffles), mean with Student's 95 % interval. Noise has std 1, lag-1 correlation 0, kurtosis 3, "
        "natural-order 25 L about 2.3.",
        "",
        *markdown(["regulariser", *FIGURES], rows, names=1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rms", type=float, default=0.0005)
    options = parser.parse_args()
    settings = f"--seeds {options.seeds} --steps {options.steps} --rms {options.rms}"
    lines = [
        "# The order in which the spectrum is taken",
        "",
        f"`python experiments/gaussianity/orders.py {settings}`",
        "",
        *penalties(),
        *gradients(),
        *climbs(options.seeds, options.steps, options.rms),
    ]
    write_atomic(HERE / "orders.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
