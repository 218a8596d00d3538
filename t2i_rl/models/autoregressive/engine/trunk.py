"""The arithmetic of transformers' LlamaModel on packed weights, attention left to the caller."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from t2i_rl.models.autoregressive.engine.weights import LayerWeights, Weights


def project(
    x: torch.Tensor,
    layer: LayerWeights,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sizes: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys `(B, heads, L, d)` turned to their positions, and values, of `x` `(B, L, D)`;
    `sizes` are `(heads, kv_heads, d)`."""
    heads, kv_heads, dim = sizes
    x = F.rms_norm(x, x.shape[-1:], layer.attention_norm, eps)
    x = F.linear(x, layer.qkv, layer.qkv_bias).view(*x.shape[:2], heads + 2 * kv_heads, dim)
    turned, v = x.split([heads + kv_heads, kv_heads], dim=2)
    half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], dim=-1)
    turned = turned * cos.unsqueeze(2) + half * sin.unsqueeze(2)
    q, k = turned.split([heads, kv_heads], dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def finish(x: torch.Tensor, attended: torch.Tensor, layer: LayerWeights, eps: float) -> torch.Tensor:
    """What follows attention: output projection and MLP, added to the residual `(B, L, D)`."""
    x = x + F.linear(attended.transpose(1, 2).flatten(2), layer.out, layer.out_bias)
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, eps), layer.gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, layer.down)


def run_trunk(
    weights: Weights,
    config: Any,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attend: Callable,
    fused: Callable = lambda function: function,
) -> torch.Tensor:
    """Hidden states `(B, L, D)` after the final norm. `cos`, `sin` `(B, L, d)`; `attend(layer
    number, q, k, v)` is the attention; `fused` may compile the two halves of a layer."""
    sizes, eps = (config.num_attention_heads, config.num_key_value_heads, config.head_dim), config.rms_norm_eps
    before, after = fused(project), fused(finish)
    for number, layer in enumerate(weights.layers):
        q, k, v = before(x, layer, eps, cos, sin, sizes)
        x = after(x, attend(number, q, k, v), layer, eps)
    return F.rms_norm(x, x.shape[-1:], weights.norm, eps)
