"""Conversations of different lengths side by side in rows, so that little is padding."""

from collections.abc import Sequence

import torch


def pack(lengths: Sequence[int], tokens_per_pass: int) -> list[list[list[int]]]:
    """Passes of rows of conversations, by number.

    A row is as long as the longest conversation and takes others while they fit (first fit, longest
    first); a pass takes as many rows as `tokens_per_pass` holds, one at least.
    """
    width = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []  # tokens that still fit into each row
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        row = next((row for row, tokens in enumerate(room) if tokens >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(number)
        room[row] -= lengths[number]
    rows_per_pass = max(1, tokens_per_pass // width)
    return [rows[first : first + rows_per_pass] for first in range(0, len(rows), rows_per_pass)]


def places(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens belong, of rows of conversations' lengths.

    Returns the number of a token's conversation in its row, -1 for padding, and the token's
    position in its conversation, both `(R, L)`.
    """
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
    """Who sees whom, bool `(R, 1, L, L)`: each token the earlier ones of its own conversation.

    Padding sees padding, so that no row is empty.
    """
    same = owner[:, :, None] == owner[:, None, :]
    return (same & torch.ones_like(same[0]).tril())[:, None]
