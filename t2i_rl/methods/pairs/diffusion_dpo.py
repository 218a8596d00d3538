"""Diffusion-DPO: fine-tuning on which of two pictures of a prompt is preferred (arXiv 2311.12908)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer

from t2i_rl.core.numbers import Positive, check_arguments
from t2i_rl.methods.pairs.base import Grid, PairMethod, adapt, check_lora, mean_over
from t2i_rl.methods.pairs.loss import pair_errors
from t2i_rl.models.diffusion.base import LatentDiffusion


class DiffusionDPO(PairMethod):
    """`-log sigmoid(-beta / 2 * ((e_w - r_w) - (e_l - r_l)))`: mean squared errors of the adapted model (`e`) and the
    untouched one (`r`) on the preferred and the other picture of one prompt, at the same time and noise (eq. 14, `beta`
    being its beta * T on means).

    Args:
        beta: how hard the model is held to where it started, in the units of the released code's `beta_dpo`, whose loss
            has the factor of a half: the paper's 2000 (SD1.5) to 5000 (SDXL); the released scripts take 5000 for both.
        lora: arguments of peft's LoraConfig: adapters in the denoiser learn, and switched off they are the reference.
        options: see `PairMethod`; there are no tokens, and noise and time are each pair's own.
    """

    learns_from = "preferences"
    contrasts = False

    def __init__(self, model: LatentDiffusion, optimizer: partial, lora: dict, beta: Positive = 2000.0, **options: Any):
        self.check({"lora": lora, "beta": beta, **options})
        super().__init__(model, optimizer, tokens=0, **options)
        self.beta = beta
        adapt(model.denoiser, lora, self.seed)
        self.adapters = [module for module in model.denoiser.modules() if isinstance(module, BaseTunerLayer)]

    @staticmethod
    def check(options: Mapping) -> None:
        check_arguments(DiffusionDPO, options, "method")
        check_lora(options["lora"])
        PairMethod.check(options)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The model without its adapters: the reference."""
        for module in self.adapters:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in self.adapters:
                module.enable_adapters(True)

    def accumulate(self, grid: Grid, soft_tokens: torch.Tensor | None) -> dict[str, float]:
        """Rows of the grid are the preferred pictures, then the others."""
        half = len(grid) // 2
        slices, parts = list(self.passes(torch.arange(half), torch.arange(half))), []
        for number, part in enumerate(slices, start=1):
            rows = torch.arange(half, device=self.device)[part]
            both = torch.cat([rows, rows + half])
            with torch.no_grad(), self.untouched():
                reference = pair_errors(self.predict(grid, None, both, grid.own[both]), grid.target[both])
            errors = pair_errors(self.predict(grid, None, both, grid.own[both]), grid.target[both])
            wins, losses = (errors - reference).chunk(2)
            self.backward_pass(self._losses(wins, losses).sum() / half, None, last=number == len(slices))
            parts.append(torch.stack([wins, losses]).detach())
        wins, losses = torch.cat(parts, dim=1)
        return {
            "train/loss": mean_over(self._losses(wins, losses)),
            "train/implicit_accuracy": mean_over((wins < losses).float()),
            "train/error_preferred": mean_over(wins),
            "train/error_other": mean_over(losses),
        }

    def _losses(self, preferred: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Loss of each pair, by how much the errors of its two pictures have grown over the untouched model's."""
        return -F.logsigmoid(-0.5 * self.beta * (preferred - other))
