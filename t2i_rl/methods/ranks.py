"""How the ranks of a training meet: sums and maxima over all of them, and passes that they walk through together."""

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

Content = TypeVar("Content")


class Pass(NamedTuple, Generic[Content]):
    """One forward and backward pass of an optimizer step.

    number: which of this rank's passes it is. content: what it computes.
    counts: 1, or 0 where it was computed before and only keeps the other ranks company.
    last: whether no rank has another pass after this one.
    """

    number: int
    content: Content
    counts: float
    last: bool


def in_step(passes: Sequence[Content], device: torch.device) -> list[Pass[Content]]:
    """This rank's passes, and its last one again until the rank that has most is through; every rank calls it.

    Under FSDP each pass gathers weights from all ranks, and under DDP gradients meet in the last one. A rank that
    stopped early would leave the others waiting, so it repeats its last pass for nothing.
    """
    count = most_over_ranks(len(passes), device)
    owned = [min(number, len(passes) - 1) for number in range(count)]
    return [
        Pass(own, passes[own], counts=float(number == own), last=number == count - 1)
        for number, own in enumerate(owned)
    ]


def rank_count() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Numbers by name, each added up over all ranks in float64; every rank calls it."""
    together = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(together)
    return dict(zip(values, together.tolist(), strict=True))


def most_over_ranks(count: int, device: torch.device) -> int:
    """The largest of every rank's `count`; every rank calls it."""
    most = torch.tensor(count, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
