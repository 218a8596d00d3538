"""What flow-matching models have in common (Lipman et al. 2023; Esser et al. 2024)."""

import torch

from t2i_rl.models.diffusion import LatentDiffusion


class FlowMatching(LatentDiffusion):
    """`x_t = (1 - sigma) x0 + sigma eps` with `sigma = t / 1000`; predicts the velocity `eps - x0`."""

    denoiser_name = "transformer"

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigmas = (t / 1000).view(-1, 1, 1, 1).to(x0)
        return (1 - sigmas) * x0 + sigmas * eps

    def target(self, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return eps - x0
