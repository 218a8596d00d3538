"""What flow-matching models have in common (Lipman et al. 2023; Esser et al. 2024)."""

from collections.abc import Mapping

import torch

from t2i_rl.models.diffusion.base import LatentDiffusion
from t2i_rl.models.diffusion.schedulers import check_flow


class FlowMatching(LatentDiffusion):
    """`x_t = (1 - sigma) x0 + sigma eps` with `sigma = t / 1000`; predicts the velocity `eps -
    x0`."""

    denoiser_name = "transformer"

    @classmethod
    def check_scheduler(cls, path: str, config: Mapping, settings: Mapping) -> None:
        check_flow(path, config)

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigmas = (t / 1000).view(-1, 1, 1, 1).to(x0)
        return (1 - sigmas) * x0 + sigmas * eps

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return eps - x0
