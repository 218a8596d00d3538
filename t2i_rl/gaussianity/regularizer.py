"""A weighted sum of penalties on noise, and a set that the noise is put back into.

`conf/regularizer/*.yaml` each name one.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from t2i_rl.gaussianity.moments import Generators


class Penalty(Protocol):
    """Says how far each row is from Gaussian."""

    @property
    def weight(self) -> float: ...

    def __call__(self, x: torch.Tensor, generators: Generators) -> torch.Tensor:
        """Latents `(B, ...)` and one generator a row -> `(B,)`, without the weight."""


class Constraint(Protocol):
    """A set that noise is put back into.

    project_gradient: whether every gradient is put onto the set too.
    """

    @property
    def project_gradient(self) -> bool: ...

    def __call__(self, x: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """Latents `(B, ...)` and what they began as -> latents in the set."""


class Regularizer(nn.Module):
    """`sum_j weight_j term_j(x)` for latents `(B, ...)`, and what holds them after every step.

    Args:
        terms: penalties by name, each with its `weight`; none at all is a regulariser that does
            nothing.
        constraint: of `constraints.py`, or None.
    """

    def __init__(self, terms: Mapping[str, Penalty | None] | None = None, constraint: Constraint | None = None):
        super().__init__()
        self.terms = {name: term for name, term in (terms or {}).items() if term is not None}
        self.constraint = constraint

    def forward(self, x: torch.Tensor, generators: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total `(B,)`, and each term `(B,)` without its weight.

        Shuffles of row `i` come from `generators[i]`.
        """
        parts = {name: term(x, generators) for name, term in self.terms.items()}
        total = sum((self.terms[name].weight * value for name, value in parts.items()), start=x.new_zeros(len(x)))
        return total, parts
