"""Keys and values in memory that is laid out once."""

from typing import Any

import torch


class KVCache:
    """Keys `(rows, kv_heads, d, L)` and values `(rows, kv_heads, L, d)` of each layer.

    Keys are transposed, as batched products read them fastest. `L` is `capacity` unless `resize`
    makes it less: then they are contiguous at that length, in the same memory.
    """

    def __init__(self, config: Any, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.shape = (rows, config.num_key_value_heads, config.head_dim)
        size = rows * config.num_key_value_heads * config.head_dim * capacity
        self._memory = torch.zeros(config.num_hidden_layers, 2, size, dtype=dtype, device=device)
        self._aside: torch.Tensor | None = None
        self._view(capacity)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer]

    def nbytes(self) -> int:
        """Bytes of the whole memory."""
        return self._memory.nbytes

    def resize(self, length: int, keep: int = 0) -> None:
        """Make `L` equal `length`, and move the first `keep` positions there.

        All others hold finite numbers of no meaning.
        """
        former_layers = self.layers
        self._view(length)
        if not keep:
            return
        if self._aside is None:
            self._aside = torch.empty_like(self._memory[0, 0])
        for (keys, values), (new_keys, new_values) in zip(former_layers, self.layers):
            for old, new in ((keys[..., :keep], new_keys[..., :keep]), (values[:, :, :keep], new_values[:, :, :keep])):
                aside = self._aside[: old.numel()].view(old.shape)
                aside.copy_(old)
                new.copy_(aside)

    def _view(self, length: int) -> None:
        rows, heads, dim = self.shape
        self.length = length
        self.layers = [
            (keys.view(rows, heads, dim, length), values.view(rows, heads, length, dim))
            for keys, values in self._memory[:, :, : rows * heads * dim * length]
        ]
