"""GRPO in pure functions: advantages within a group, the clipped policy loss, the k3 KL, three loss reductions."""

import torch

from t2i_rl.core.errors import UserError

LARGEST_LOG_RATIO = 20.0  # nats: e^20 is 4.9e8, and e^89 overflows float32
REDUCTIONS = ("token", "sequence", "prompt")


def group_advantages(rewards: torch.Tensor, group_size: int, eps: float = 1e-4) -> torch.Tensor:
    """`(r - mean) / (std + eps)` within each run of `group_size` rewards; unbiased std (DeepSeekMath eq. 3; T2I-R1's
    constants).

    Args:
        rewards: `(P * group_size,)`, the rows of a group adjacent.
    """
    groups = rewards.double().view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True) + eps)).flatten().to(torch.float32)


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """Per-token clipped surrogate, `(B, T)`: `-min(ratio A, clip(ratio, 1 - c, 1 + c) A)` (PPO eq. 7), see
    `importance_ratio`."""
    ratio = importance_ratio(logprobs - old_logprobs)
    gain = advantages.unsqueeze(-1)
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip_range, 1 + clip_range) * gain)


def importance_ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """`exp(log_ratio)`, which stands still beyond `LARGEST_LOG_RATIO`.

    An infinite ratio would make the clipped loss's gradient 0 * inf, a NaN where 0 is right. Beyond the bound the slope
    is 0.
    """
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


def k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: `e^d - d - 1`, `d = reference - policy`; `>= 0`,
    with gradient.

    `d` ends at `LARGEST_LOG_RATIO`, and the slope there is 0: the gradient of one token so far from the reference would
    overflow, or else be the whole of the clipped step.
    """
    difference = (reference_logprobs - logprobs).clamp(max=LARGEST_LOG_RATIO)
    return difference.exp() - difference - 1


def token_weights(weights: torch.Tensor, reduction: str, group_size: int = 1) -> torch.Tensor:
    """Weight of each token in a loss that is the weighted sum over the total weight of the global batch, `(B, T)`.

    - `token`: every token counts alike: one mean over the tokens of the global batch (DAPO).
    - `sequence`: every sample has a total of 1, so its tokens count `1 / |o_i|` (DeepSeekMath eq. 3; IRIS's text).
    - `prompt`: every prompt's group has a total of 1: a mean over the tokens of a prompt, then a mean over prompts. The
      released code of T2I-R1 and IRIS does this, where a rank holds one prompt at a time.

    Args:
        weights: `(B, T)`, 0 for padding, else how much a token counts in its sample (a mask where all count alike).
        group_size: rows of a prompt, which are adjacent; read by `prompt` alone.

    Raises:
        UserError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"loss_reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    weights = weights.float()
    if reduction == "token":
        return weights
    rows = group_size if reduction == "prompt" else 1
    totals = weights.sum(-1).view(-1, rows).sum(-1).repeat_interleave(rows)
    return weights / totals.unsqueeze(-1)
