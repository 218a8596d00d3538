"""Langevin steps with contraction, which keep a Gaussian as it is without a gradient (ORIGEN, arXiv 2503.22194)."""

from collections.abc import Callable
from typing import overload

import torch
from torch.optim.optimizer import ParamsT

from t2i_rl.core.numbers import ClimbingRate, Decay, Seed, check_arguments


class Langevin(torch.optim.Optimizer):
    """`x <- sqrt(1 - s) x - lr grad + sqrt(s) n`, `n` standard normal.

    Args:
        noise: s, the share of variance that is drawn anew each step.
        seed: of the noise; a method gives each row its own.

    Raises:
        UserError: a rate or a share outside its range.
    """

    def __init__(self, params: ParamsT, lr: ClimbingRate, noise: Decay = 1e-3, seed: Seed = 0):
        check_arguments(Langevin, {"lr": lr, "noise": noise, "seed": seed}, "method.optimizer")
        super().__init__(params, {"lr": lr, "noise": noise})
        self.generator = torch.Generator().manual_seed(seed)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            for x in group["params"]:
                drawn = torch.randn(x.shape, generator=self.generator).to(x)
                x.mul_((1 - group["noise"]) ** 0.5).sub_(group["lr"] * x.grad).add_(group["noise"] ** 0.5 * drawn)
        return None if closure is None else closure()
