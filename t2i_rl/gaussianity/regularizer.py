"""A weighted sum of penalties, and a set that the latent is put back into: `conf/regularizer/*.yaml` each name one."""

from collections.abc import Mapping

import torch
from torch import nn

from t2i_rl.gaussianity.moments import Generators


class Regularizer(nn.Module):
    """`sum_j weight_j term_j(x)` for latents `(B, ...)`, and what holds them after every step.

    Args:
        terms: penalties by name, each with its `weight`; none at all is a regulariser that does nothing.
        constraint: of `constraints.py`, or None.
    """

    def __init__(self, terms: Mapping[str, object | None] | None = None, constraint: object | None = None):
        super().__init__()
        self.terms = {name: term for name, term in (terms or {}).items() if term is not None}
        self.constraint = constraint

    def forward(self, x: torch.Tensor, generators: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total `(B,)` and each term `(B,)` without its weight; shuffles of row `i` come from `generators[i]`."""
        parts = {name: term(x, generators) for name, term in self.terms.items()}
        total = sum((self.terms[name].weight * value for name, value in parts.items()), start=x.new_zeros(len(x)))
        return total, parts
