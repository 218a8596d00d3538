"""Endless streams of training batches, which several processes may render in turn."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info


class NumberedBatches(IterableDataset):
    """Endless batches, of which number `i` is a function of the stream's settings and of `i` alone.

    A resumed run therefore goes on at any number, and the workers of a DataLoader, which asks them in turn, give the
    same batches in the same order, however many they are.
    """

    def __init__(self, first: int = 0):
        self.first = first

    def batch(self, number: int) -> Any:
        """Batch `number`, counted from 0."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(self.first + turn, turns):
            yield self.batch(number)
