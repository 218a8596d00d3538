"""Classifier-free guidance of a denoiser's predictions."""

import torch


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """`u + scale (c - u)` of predictions of one shape (Ho and Salimans 2022)."""
    return unconditional + scale * (conditional - unconditional)
