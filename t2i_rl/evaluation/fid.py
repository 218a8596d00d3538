"""The Frechet distance of torchmetrics between two sets of features."""

import numpy as np
import torch


class _Given(torch.nn.Module):
    """Features that were extracted before: what torchmetrics calls images are rows of features here."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """FID's distance between features `(N, D)` and `(M, D)` (Heusel et al. 2017), of what is given, on this rank alone.

    It is biased upwards, the more the smaller N is: compare equal N.

    Raises:
        ValueError: fewer than two rows, or widths that differ.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(features), len(reference)) < 2 or features.shape[1] != reference.shape[1]:
        shapes = f"{features.shape} with {reference.shape}"
        raise ValueError(f"the Frechet distance compares two rows or more of equal width, not {shapes}")
    metric = FrechetInceptionDistance(feature=_Given(features.shape[1]), sync_on_compute=False).set_dtype(torch.float64)
    for rows, real in ((features, False), (reference, True)):
        metric.update(torch.from_numpy(np.asarray(rows, dtype=np.float64)), real=real)
    return float(metric.compute())
