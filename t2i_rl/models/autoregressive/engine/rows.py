"""Left-padded rows: where their tokens stand, their unconditional twins, and guidance over both."""

import torch


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, so that padding on the left moves nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def unconditional(ids: torch.Tensor, special: dict[str, int]) -> torch.Tensor:
    """The prompt with everything but BOS and begin-of-image replaced by the pad token.

    Transformers' own `generate` does the same.
    """
    keep = (ids == special["bos"]) | (ids == special["boi"])
    return torch.where(keep, ids, special["pad"])


def guided(logits: torch.Tensor, guidance: tuple[float, ...], detach_uncond: bool = False) -> torch.Tensor:
    """Classifier-free guidance on rows `[conditional; negative; ...]`, with one scale a negative.

    It is `c <- u + w (c - u)` for each negative u in turn. One negative is the usual guidance; two
    are IRG's, without the reflection and then without the image (arXiv 2509.06945).

    Args:
        detach_uncond: no gradient through the negatives.
    """
    combined, *negatives = logits.chunk(1 + len(guidance))
    for scale, negative in zip(guidance, negatives, strict=True):
        negative = negative.detach() if detach_uncond else negative
        combined = negative + scale * (combined - negative)
    return combined
