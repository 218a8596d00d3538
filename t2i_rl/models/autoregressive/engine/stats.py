"""What is read off a next-token distribution: log-probability, self-certainty, entropy.

Always float32, always the full softmax.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class TokenStats:
    """Per token, `(B, T)`, zero where `mask` is False.

    Self-certainty and entropy carry no gradient.

    self_certainty: KL(U || p) = logsumexp(z) - mean(z) - log V, in nats (IRIS; Kang et al. 2025),
    at temperature 1.
    entropy: H(p) in nats, at temperature 1.
    """

    logprobs: torch.Tensor
    self_certainty: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor


def self_certainty(logits: torch.Tensor) -> torch.Tensor:
    """KL(U || softmax(logits)) over the last axis, `>= 0`; its gradient is `p - 1/V`."""
    z = logits.float()
    return z.logsumexp(-1) - z.mean(-1) - math.log(z.shape[-1])


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H(softmax(logits)) over the last axis, in [0, log V]."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def token_stats(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> TokenStats:
    """Statistics of `tokens` `(B, T)` under `logits` `(B, T, V)`.

    Log-probs are at `temperature`, the one that the tokens were sampled at.
    """
    z = logits.float()
    logprobs = (z / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        certainty, spread = self_certainty(z), entropy(z)
    return TokenStats(logprobs * mask, certainty * mask, spread * mask, mask)


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw one token a row by inverting the CDF of `softmax(logits / temperature)` at `uniforms`
    `(B,)`; temperature 0 is greedy.

    The whole distribution is sampled: no top-k, no top-p, so a log-prob over the full softmax is
    the sampler's own.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cdf, (uniforms.unsqueeze(-1) * cdf[:, -1:])).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
