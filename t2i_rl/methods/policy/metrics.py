"""What a GRPO step logs. Names are those that users of RL trainers look for; docs/metrics.md says what each one tells."""

import resource

import torch

from t2i_rl.core.contracts import RewardOutput
from t2i_rl.methods.policy.loss import importance_ratio
from t2i_rl.models.autoregressive.rollout import TokenRollout


def rollout_metrics(
    rollout: TokenRollout,
    reward: RewardOutput,
    watched: dict[str, RewardOutput],
    advantages: torch.Tensor,
    times: dict[str, float],
) -> dict[str, float]:
    """Numbers about what was sampled, how it was judged, and how long it took. Under DDP each is averaged over ranks."""
    group_std = reward.total.double().view(-1, rollout.group_size).std(dim=1)
    metrics = {
        "reward/total": mean(reward.total),
        "reward/group_std": mean(group_std),
        "reward/zero_std_ratio": mean(group_std == 0),
        "advantage/max": float(advantages.max()),
        "advantage/abs_mean": mean(advantages.abs()),
        "image/self_certainty": masked_mean(rollout.image_stats.self_certainty, rollout.image_stats.mask),
        "image/entropy": masked_mean(rollout.image_stats.entropy, rollout.image_stats.mask),
        "image/codes_used": rollout.image_tokens.unique().numel() / rollout.image_vocabulary,
        "image/behaviour_gap": mean(rollout.drawn.logprobs - rollout.image_stats.logprobs),
        "image/drawn_self_certainty": mean(rollout.drawn.conditional_self_certainty),
        "image/guided_self_certainty": mean(rollout.drawn.guided_self_certainty),
    }
    for name, part in reward.parts.items():
        metrics[f"reward/{name}"] = mean(part)
        metrics[f"reward/{name}_group_std"] = mean(part.double().view(-1, rollout.group_size).std(dim=1))
    for name, output in watched.items():
        metrics[f"watch/{name}"] = mean(output.total)
    lengths = torch.zeros(len(rollout))
    if rollout.text_stats is not None:
        lengths = rollout.plan_token_mask.sum(-1).double().cpu()
        metrics |= {
            "text/self_certainty": masked_mean(rollout.text_stats.self_certainty, rollout.text_stats.mask),
            "text/entropy": masked_mean(rollout.text_stats.entropy, rollout.text_stats.mask),
            "text/plan_length": mean(lengths),
            "text/plan_length_std": float(lengths.std()),
            "text/truncated": mean(rollout.plan_truncated),
            "text/distinct_plans": len(set(rollout.plans)) / len(rollout),
            "reward/plan_length_correlation": within_group_correlation(reward.total, lengths, rollout.group_size),
        }
    seconds = times["update"] - times["start"]
    metrics |= {
        "time/rollout": times["rollout"] - times["start"],
        "time/score": times["score"] - times["rollout"],
        "time/reward": times["reward"] - times["score"],
        "time/update": times["update"] - times["reward"],
        "throughput/images_per_s": len(rollout) / seconds,
        "throughput/tokens_per_s": (rollout.image_tokens.numel() + float(lengths.sum())) / seconds,
        "memory/peak_gib": peak_memory_gib(),
    }
    return metrics


def update_metrics(updates: list[dict]) -> dict[str, float]:
    """Numbers about the optimizer steps of one rollout: the last step's loss and norm, ratios and KL over all of them."""
    log_ratio, kl, mask, plan_length = [], [], [], updates[-1]["plan_length"]
    for update in updates:
        for _, ratio_part, kl_part, mask_part in update["parts"]:
            log_ratio.append(ratio_part)
            kl.append(kl_part)
            mask.append(mask_part)
    log_ratio, kl, mask = torch.cat(log_ratio), torch.cat(kl), torch.cat(mask)
    ratio, clip_range = importance_ratio(log_ratio), updates[-1]["clip_range"]
    metrics = {
        "train/loss": float(sum(part[0] for part in updates[-1]["parts"])),
        "train/grad_norm": float(updates[-1]["norm"]),
        "train/ratio_mean": masked_mean(ratio, mask),
        "train/ratio_max": float(ratio[mask].max()),
        "train/clip_fraction": masked_mean((ratio - 1).abs() > clip_range, mask),
        "train/kl": masked_mean(kl, mask),
        "image/kl": masked_mean(kl[:, plan_length:], mask[:, plan_length:]),
    }
    if plan_length:
        metrics["text/kl"] = masked_mean(kl[:, :plan_length], mask[:, :plan_length])
    return metrics


def mean(values: torch.Tensor) -> float:
    return float(values.double().mean())


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    return float(torch.where(mask, values.double(), 0.0).sum() / mask.sum())  # padding may hold anything


def within_group_correlation(a: torch.Tensor, b: torch.Tensor, group_size: int) -> float:
    """Pearson correlation after taking each group's mean off both; 0 where either never varies within a group."""
    a, b = (x.detach().double().cpu().view(-1, group_size) for x in (a, b))
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
