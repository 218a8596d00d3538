"""What a GRPO step over tokens logs beyond any other: what was written and drawn, and how fast."""

import torch

from t2i_rl.methods.policy.actions import Step
from t2i_rl.methods.policy.metrics import masked_mean, mean, peak_memory_gib, within_group_correlation
from t2i_rl.models.autoregressive.rollout import TokenRollout


def token_metrics(step: Step[TokenRollout]) -> dict[str, float]:
    """Numbers about the plans and images of one rollout. Under DDP each is averaged over ranks."""
    rollout, image = step.rollout, step.rollout.image_stats
    assert image is not None  # `GRPO.score` keeps them
    lengths = torch.zeros(len(rollout))
    metrics = {
        "image/self_certainty": masked_mean(image.self_certainty, image.mask),
        "image/entropy": masked_mean(image.entropy, image.mask),
        "image/codes_used": rollout.image_tokens.unique().numel() / rollout.image_vocabulary,
        "image/behaviour_gap": mean(rollout.drawn.logprobs - image.logprobs),
        "image/drawn_self_certainty": mean(rollout.drawn.conditional_self_certainty),
        "image/guided_self_certainty": mean(rollout.drawn.guided_self_certainty),
    }
    if rollout.text_stats is not None and rollout.plan_token_mask is not None and rollout.plan_truncated is not None:
        text, lengths = rollout.text_stats, rollout.plan_token_mask.sum(-1).double().cpu()
        correlation = within_group_correlation(step.reward.total, lengths, rollout.group_size)
        metrics |= {
            "text/self_certainty": masked_mean(text.self_certainty, text.mask),
            "text/entropy": masked_mean(text.entropy, text.mask),
            "text/plan_length": mean(lengths),
            "text/plan_length_std": float(lengths.std()),
            "text/truncated": mean(rollout.plan_truncated),
            "text/distinct_plans": len(set(rollout.plans)) / len(rollout),
            "reward/plan_length_correlation": correlation,
        }
    seconds = sum(step.seconds.values())
    return metrics | {
        "throughput/images_per_s": len(rollout) / seconds,
        "throughput/tokens_per_s": (rollout.image_tokens.numel() + float(lengths.sum())) / seconds,
        "memory/peak_gib": peak_memory_gib(),
    }
