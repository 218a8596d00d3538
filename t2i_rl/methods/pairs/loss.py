"""The losses of SoftREPA and AGSM on a grid of pairs: rows are images, columns texts, one text a row's own."""

import math

import torch
import torch.nn.functional as F

REDUCTIONS = ("mean", "sum")


def pair_errors(predicted: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Squared errors `(...)` of predictions `(..., C, h, w)`: their mean over an image's elements (as released), or
    their sum (as written)."""
    errors = (predicted - target).square()
    return errors.mean(dim=(-3, -2, -1)) if reduction == "mean" else errors.sum(dim=(-3, -2, -1))


def softrepa_logits(errors: torch.Tensor, scale: float = 4.0, temperature: float = 0.07) -> torch.Tensor:
    """`scale * exp(-errors / temperature)`, in (0, scale]: the double exponential of SoftREPA's eq. 1, with the
    released constants."""
    return scale * torch.exp(-errors / temperature)


def softrepa_loss(
    errors: torch.Tensor, own: torch.Tensor, scale: float = 4.0, temperature: float = 0.07
) -> torch.Tensor:
    """Cross-entropy `(R,)` of each image's own text among all texts.

    Args:
        errors: `(R, B)`, images by texts: the softmax goes over texts.
        own: `(R,)`, the column of each image's own text.

    Chance is `ln B`; the least possible value is `ln(1 + (B - 1) exp(-scale))`.
    """
    return F.cross_entropy(softrepa_logits(errors, scale, temperature), own, reduction="none")


def softrepa_floor(texts: int, scale: float = 4.0) -> float:
    """The least value that `softrepa_loss` can take with so many texts, in nats."""
    return math.log(1 + (texts - 1) * math.exp(-scale))


def alignment_guidance(
    reference: torch.Tensor, target: torch.Tensor, temperature: float = 0.1, reduction: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plackett-Luce weights `w` `(R, B)` and `delta = reference - sum_k w_k reference_k`, neither with gradient (AGSM
    Alg. 1).

    Args:
        reference: the averaged bank's predictions `(R, B, C, h, w)` of R images under B texts.
        target: what they ought to be, `(R, C, h, w)`.
        temperature, reduction: weights are `softmax_j(-error_j / temperature)` of mean (released: temperature 0.1) or
            summed errors (paper).
    """
    reference = reference.detach()
    errors = pair_errors(reference, target.unsqueeze(1), reduction)
    weights = torch.softmax(-errors / temperature, dim=1)
    # no einsum: autocast would make it bfloat16, whose rounding is as large as the difference between captions
    return weights, reference - (weights[:, :, None, None, None] * reference).sum(dim=1, keepdim=True)


def agsm_targets(
    target: torch.Tensor, delta: torch.Tensor, own: torch.Tensor, gamma_positive: float, gamma_negative: float
) -> torch.Tensor:
    """What each pair regresses to, `(R, B, C, h, w)`: `target + gamma_positive * delta` for an image's own text, else
    `target - gamma_negative * delta` (AGSM eq. 14 for noise, eq. 16 for velocities)."""
    gamma = torch.full(delta.shape[:2], -gamma_negative, device=delta.device, dtype=delta.dtype)
    gamma[torch.arange(len(own)), own] = gamma_positive
    return target.unsqueeze(1) + gamma[:, :, None, None, None] * delta
