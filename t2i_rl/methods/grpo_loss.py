"""GRPO in pure functions: advantages within a group, the clipped policy loss, the k3 KL, two loss reductions."""

import torch

from t2i_rl.errors import UserError

REDUCTIONS = ("token", "sequence")


def group_advantages(rewards: torch.Tensor, group_size: int, eps: float = 1e-4) -> torch.Tensor:
    """`(r - mean) / (std + eps)` within each run of `group_size` rewards; unbiased std (DeepSeekMath eq. 3; T2I-R1's constants).

    Args:
        rewards: `(P * group_size,)`, the rows of a group adjacent.
    """
    groups = rewards.double().view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True) + eps)).flatten().to(torch.float32)


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> torch.Tensor:
    """Per-token clipped surrogate, `(B, T)`: `-min(ratio A, clip(ratio, 1 - c, 1 + c) A)` (PPO eq. 7), `ratio = exp(logp - old)`."""
    ratio = (logprobs - old_logprobs).exp()
    gain = advantages.unsqueeze(-1)
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip_range, 1 + clip_range) * gain)


def k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: `e^d - d - 1`, `d = reference - policy`; `>= 0`, with gradient."""
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1


def token_weights(mask: torch.Tensor, reduction: str) -> torch.Tensor:
    """Unnormalised weight of each token, `(B, T)`: `token` counts every token alike (T2I-R1, DAPO), `sequence` gives each sample
    a total of 1 (GRPO's `1/|o_i|`, IRIS). The loss is the weighted sum over the total weight of the global batch.

    Raises:
        UserError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"loss_reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    weights = mask.float()
    return weights if reduction == "token" else weights / weights.sum(-1, keepdim=True)
