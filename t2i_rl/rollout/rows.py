"""Left-padded rows: where their tokens stand, their unconditional twins, and guidance over both."""

import torch


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, so that padding moves nothing (spec trap 7)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def unconditional(ids: torch.Tensor, special: dict[str, int]) -> torch.Tensor:
    """The prompt with everything but BOS and begin-of-image replaced by the pad token (as transformers' own generate)."""
    keep = (ids == special["bos"]) | (ids == special["boi"])
    return torch.where(keep, ids, special["pad"])


def guided(logits: torch.Tensor, guidance_scale: float, detach_uncond: bool = False) -> torch.Tensor:
    """Classifier-free guidance on rows `[conditional; unconditional]`: `u + w (c - u)`; `w = 1` has conditional rows only."""
    if guidance_scale == 1:
        return logits
    conditional, uncond = logits.chunk(2)
    uncond = uncond.detach() if detach_uncond else uncond
    return uncond + guidance_scale * (conditional - uncond)
