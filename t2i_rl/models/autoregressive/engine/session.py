"""One batch being decoded: a static key-value cache and a step that never waits for the host."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F

from t2i_rl.models.autoregressive.engine.cache import KVCache
from t2i_rl.models.autoregressive.engine.graph import Recorder
from t2i_rl.models.autoregressive.engine.rows import positions
from t2i_rl.models.autoregressive.engine.trunk import run_trunk

PREFILL_TOKENS = 16384  # read at once, so that prefixes of many rows need no memory of their own
# a step attends to a multiple of so many positions: few recordings on a GPU, contiguous memory on a
# CPU
BUCKET = {"cuda": 64, "cpu": 32}


def in_its_own_dtype(method: Callable) -> Callable:
    """A method without autocast, which would change the dtype of weights and caches again."""

    @wraps(method)
    def plainly(self: "Session", *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.hidden.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return plainly


class Session:
    """`rows` rows, `group_size` of them after each prefix, and room for `new_tokens` each.

    Where `group_size > 1` the keys and values of a prefix are stored once and read once a step for
    its whole group (`common`); what a row adds is its `own`. With `group_size == 1` prefix and
    additions lie in one cache. `emitter(hidden, slot)` samples token number `slot` of each row and
    returns the embeddings `(rows, D)` to go on with.
    """

    def __init__(self, engine: Any, rows: int, group_size: int, prefix: int, new_tokens: int):
        config, device, dtype = engine.config, engine.device, engine.dtype
        self.config, self.weights = config, engine.weights
        self.rows, self.group_size, self.prefixes = rows, group_size, rows // group_size
        self.prefix, self.new_tokens = prefix, new_tokens
        self.start = prefix if group_size == 1 else 0
        self.bucket, self.grows = BUCKET[device.type], device.type == "cpu"
        self.own = KVCache(config, rows, self.start + new_tokens, dtype, device)
        self.common = KVCache(config, self.prefixes, prefix, dtype, device) if group_size > 1 else self.own
        self.own_bias = torch.zeros(rows, 1, 1, self.start + new_tokens, device=device)
        self.common_bias = torch.zeros(self.prefixes, 1, 1, prefix, device=device)
        self.cos, self.sin = engine.rotary(prefix + new_tokens)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.prefix_lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.hidden = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
        self.recorder = Recorder(device, engine.options)
        self.emitter = None

    @torch.no_grad()
    @in_its_own_dtype
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, embeds: torch.Tensor | None = None) -> None:
        """Read the prefixes `(prefixes, L)`, left-padded, `L <= prefix`; equal ones once. `embeds`
        `(prefixes, L, D)` stand in for those of `ids`.

        Afterwards `hidden` `(rows, D)` predicts the first new token of each row.
        """
        if self.grows:
            self.own.resize(self.start)
        padding = (self.prefix - ids.shape[1], 0)
        mask = F.pad(mask.bool(), padding)
        # distinct prefixes and their masks; `number` is the distinct prefix of each of the prefixes
        if embeds is None:
            distinct_ids, number = F.pad(ids, padding).masked_fill(~mask, -1).unique(dim=0, return_inverse=True)
            distinct_mask, distinct = distinct_ids >= 0, distinct_ids.clamp(min=0)
        else:
            distinct_mask, number = mask, torch.arange(len(mask), device=mask.device)
            distinct = F.pad(embeds, (0, 0, *padding))
        count, width = len(distinct_mask), self.hidden.shape[1]
        hidden = torch.empty(count, width, dtype=self.hidden.dtype, device=self.hidden.device)
        at_once = max(1, PREFILL_TOKENS // self.prefix)
        for first in range(0, count, at_once):
            part = slice(first, first + at_once)
            x = self.weights.text_embed[distinct[part]] if embeds is None else distinct[part].to(hidden.dtype)
            rows = (number >= first) & (number < first + at_once)
            hidden[part] = self._read(x, distinct_mask[part], rows, number - first)
        group = torch.arange(self.rows, device=mask.device) // self.group_size
        self.hidden.copy_(hidden[number[group]])
        hides = torch.where(mask, 0.0, float("-inf"))[:, None, None]
        self.common_bias.copy_(hides)
        self.own_bias.fill_(float("-inf"))
        if self.start:
            self.own_bias[..., : self.start].copy_(hides)
        self.prefix_lengths.copy_(mask.sum(-1)[group])
        self.slot.zero_()

    def _read(self, x: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """Run the distinct prefixes `x` `(U, prefix, D)` through the trunk and put their keys and
        values where `rows` need them."""
        length = x.shape[1]
        visible = mask[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        visible = visible | torch.eye(length, dtype=torch.bool, device=x.device)  # padding attends itself: no NaN
        number = number[rows]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.common[layer]
            keys[rows, :, :, :length] = k[number].transpose(-1, -2)
            values[rows, :, :length] = v[number]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])

        position = positions(mask)
        return run_trunk(self.weights, self.config, x, self.cos[position], self.sin[position], attend)[:, -1]

    @torch.no_grad()
    @in_its_own_dtype
    def decode(self, ended: torch.Tensor | None = None) -> int:
        """Emit up to `new_tokens` tokens a row; returns how many.

        Where `ended` `(rows,)` is given, stops soon after all of it is true.
        """
        look_every = 1 if self.slot.device.type == "cpu" else 16  # a look waits for a GPU
        for count in range(1, self.new_tokens):
            filled = self.start + min(-(-count // self.bucket) * self.bucket, self.new_tokens)
            if self.grows and self.own.length < filled:
                self.own.resize(filled, keep=self.own.length)
            self.recorder.run(self.step, filled, self._state)
            if ended is not None and count % look_every == 0 and bool(ended.all()):
                return count
        self.emitter(self.hidden, self.slot)
        return self.new_tokens

    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(cache.nbytes() for cache in {self.own, self.common})

    def _state(self) -> list[torch.Tensor]:
        return [self.slot, self.hidden, self.own_bias, *self.emitter.state()]

    def step(self, filled: int) -> None:
        """Emit one token a row and run it through the trunk; attends to the first `filled` places.

        No argument or result leaves the device.
        """
        x = self.emitter(self.hidden, self.slot).unsqueeze(1)
        self.own_bias.index_fill_(3, self.start + self.slot, 0.0)
        position = (self.prefix_lengths + self.slot).unsqueeze(1)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.own[layer]
            keys.index_copy_(3, self.start + self.slot, k.transpose(-1, -2))
            values.index_copy_(2, self.start + self.slot, v)
            keys, values = keys[..., :filled], values[:, :, :filled]
            rows, heads, _, dim = q.shape
            q = (q * dim**-0.5).view(rows, k.shape[1], -1, dim)
            scores = (q @ keys).float() + self.own_bias[..., :filled]
            if self.group_size == 1:
                return (scores.softmax(-1).to(v.dtype) @ values).view(rows, heads, 1, dim)
            common = (self._by_group(q) @ self.common[layer][0]).float() + self.common_bias
            scores = torch.cat([self._by_row(common), scores], dim=-1).softmax(-1).to(v.dtype)
            to_prefix, to_own = scores.split([self.prefix, filled], dim=-1)
            mixed = self._by_row(self._by_group(to_prefix) @ self.common[layer][1]) + to_own @ values
            return mixed.view(rows, heads, 1, dim)

        cos, sin = self.cos[position], self.sin[position]
        x = run_trunk(self.weights, self.config, x, cos, sin, attend, self.recorder.fused)
        self.hidden.copy_(x[:, 0])
        self.slot += 1

    def _by_group(self, rows: torch.Tensor) -> torch.Tensor:
        """`(rows, kv_heads, r, n)` -> `(prefixes, kv_heads, group_size * r, n)`."""
        kv_heads, r, n = rows.shape[1:]
        split = rows.reshape(self.prefixes, self.group_size, kv_heads, r, n)
        return split.transpose(1, 2).reshape(self.prefixes, kv_heads, self.group_size * r, n)

    def _by_row(self, groups: torch.Tensor) -> torch.Tensor:
        """The inverse of `_by_group`."""
        kv_heads, n = groups.shape[1], groups.shape[-1]
        split = groups.view(self.prefixes, kv_heads, self.group_size, -1, n)
        return split.transpose(1, 2).reshape(self.rows, kv_heads, -1, n)
