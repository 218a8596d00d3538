"""Conversations of different lengths side by side in rows: each sees itself alone, and little is padding."""

from collections.abc import Sequence

import torch


def pack(lengths: Sequence[int], tokens_per_pass: int) -> list[list[list[int]]]:
    """Passes of rows of conversations, by number.

    A row is as long as the longest conversation and takes others while they fit (first fit, longest first); a pass takes as many rows as `tokens_per_pass`
    holds, one at least.
    """
    width = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((row for row, left in enumerate(room) if left >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(number)
        room[place] -= lengths[number]
    several = max(1, tokens_per_pass // width)
    return [rows[first : first + several] for first in range(0, len(rows), several)]


def places(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows of conversations' lengths: the conversation's number in its row, -1 for padding, and each place's own position, both `(R, L)`."""
    width = max(sum(row) for row in rows)
    owner, position = torch.full((len(rows), width), -1), torch.zeros(len(rows), width, dtype=torch.long)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            owner[row, start : start + length] = number
            position[row, start : start + length] = torch.arange(length)
            start += length
    return owner, position


def block_mask(owner: torch.Tensor) -> torch.Tensor:
    """Who sees whom, bool `(R, 1, L, L)`: earlier places of the same conversation; padding sees padding, so that no row is empty."""
    same = owner[:, :, None] == owner[:, None, :]
    return (same & torch.ones_like(same[0]).tril())[:, None]
