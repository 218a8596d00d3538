"""Left-padded rows: where their tokens stand, their unconditional twins, and guidance over both."""

import torch


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, so that padding moves nothing (spec trap 7)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def unconditional(ids: torch.Tensor, special: dict[str, int]) -> torch.Tensor:
    """The prompt with everything but BOS and begin-of-image replaced by the pad token (as transformers' own generate)."""
    keep = (ids == special["bos"]) | (ids == special["boi"])
    return torch.where(keep, ids, special["pad"])


def guided(logits: torch.Tensor, guidance: tuple[float, ...], detach_uncond: bool = False) -> torch.Tensor:
    """Classifier-free guidance on rows `[conditional; negative; ...]`, one scale a negative: `c <- u + w (c - u)` for each negative u in turn.

    One negative is the usual `u + w (c - u)`; two are IRG's, without the reflection and then without the picture (arXiv 2509.06945).
    """
    combined, *negatives = logits.chunk(1 + len(guidance))
    for scale, negative in zip(guidance, negatives, strict=True):
        negative = negative.detach() if detach_uncond else negative
        combined = negative + scale * (combined - negative)
    return combined
