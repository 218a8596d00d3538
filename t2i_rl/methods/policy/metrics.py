"""What a GRPO step logs, by the names that users of RL trainers look for; docs/metrics.md says what each tells."""

import resource

import torch

from t2i_rl.core.contracts import RewardOutput
from t2i_rl.methods.policy.actions import Step, Update


def reward_metrics(step: Step) -> dict[str, float]:
    """What the rewards and the watched judges said, and how many groups had nothing to learn from."""
    totals = step.reward.total.double().view(-1, step.rollout.group_size)
    metrics = {"reward/total": mean(step.reward.total), "reward/zero_std_ratio": mean(totals.std(dim=1) == 0)}
    metrics |= {f"reward/{name}": mean(part) for name, part in step.reward.parts.items()}
    return metrics | {f"watch/{name}": mean(output.total) for name, output in step.watched.items()}


def spread_metrics(reward: RewardOutput, advantages: torch.Tensor, group_size: int) -> dict[str, float]:
    """How much rewards differ within groups, and how large the advantages are that they give."""

    def group_std(values: torch.Tensor) -> float:
        return mean(values.double().view(-1, group_size).std(dim=1))

    return {
        "reward/group_std": group_std(reward.total),
        **{f"reward/{name}_group_std": group_std(part) for name, part in reward.parts.items()},
        "advantage/max": float(advantages.max()),
        "advantage/abs_mean": mean(advantages.abs()),
    }


def update_metrics(updates: list[Update], clip_range: float) -> dict[str, float]:
    """Numbers about the optimizer steps of one rollout: the last step's loss and norm, ratios and KL over all of them.

    Means are over actions, whatever they weigh in the loss.
    """
    passes = [record for update in updates for record in update.passes]
    ratio, kl = (torch.cat([getattr(record, name) for record in passes]) for name in ("ratio", "kl"))
    mask = torch.cat([record.actions.mask for record in passes])
    metrics = {
        "train/loss": float(sum(record.objective for record in updates[-1].passes)),
        "train/grad_norm": float(updates[-1].norm),
        "train/ratio_mean": masked_mean(ratio, mask),
        "train/ratio_max": float(ratio[mask].max()),
        "train/clip_fraction": masked_mean((ratio - 1).abs() > clip_range, mask),
        "train/kl": masked_mean(kl, mask),
    }
    for kind in passes[0].actions.kinds:
        places = [record.actions.kinds[kind] for record in passes]
        kl_of_kind = torch.cat([record.kl[place] for record, place in zip(passes, places, strict=True)])
        mask_of_kind = torch.cat([record.actions.mask[place] for record, place in zip(passes, places, strict=True)])
        metrics[f"{kind}/kl"] = masked_mean(kl_of_kind, mask_of_kind)
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
