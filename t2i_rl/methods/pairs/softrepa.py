"""SoftREPA: soft tokens that make each image denoise best under its own text (arXiv 2503.08250)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Positive, Weight, Whole, check_arguments
from t2i_rl.methods.pairs.base import OF_TOKENS, Grid, PairMethod, all_pairs, mean_over
from t2i_rl.methods.pairs.loss import pair_errors, softrepa_floor, softrepa_loss
from t2i_rl.models.diffusion.base import LatentDiffusion

OWN = ("scale", "temperature", "denoising_weight")


class SoftREPA(PairMethod):
    """Cross-entropy over texts of `scale * exp(-error / temperature)`, where `error` is the denoising error under each
    text.

    Args:
        variant: a name for these settings, which is written down with them: that of conf/variant, where a config made
            this (docs/alignment.md). It decides nothing.
        scale, temperature: of the logits; the released constants are 4 and 0.07, the paper's formula has no scale.
        denoising_weight: of the plain denoising error of matching pairs.
        options: see `PairMethod`.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        optimizer: partial,
        variant: str = "ours",
        scale: Positive = 4.0,
        temperature: Positive = 0.07,
        denoising_weight: Weight = 0.0,
        tokens: Count = 4,
        layers: Count | list[str] | None = None,
        buckets: Whole = 100,
        position: str = "end",
        init: str = "normal",
        times: str = "per_image",
        noise: str = "per_image",
        **options: Any,
    ):
        arguments = locals()
        own, settings = ({name: arguments[name] for name in names} for names in (OWN, OF_TOKENS))
        self.check({**own, **settings, **options})
        super().__init__(model, optimizer, **settings, **options)
        self.scale, self.temperature, self.denoising_weight = own.values()
        self.settings = {"variant": variant, **own, **settings}

    @staticmethod
    def check(options: Mapping) -> None:
        if options.get("tokens") == 0:
            raise UserError("method.tokens=0 trains nothing: SoftREPA learns soft tokens")
        check_arguments(SoftREPA, options, "method")
        PairMethod.check(options)

    def accumulate(self, grid: Grid, soft_tokens: torch.Tensor | None) -> dict[str, float]:
        """A few images at a time under all texts, since the cross-entropy of a row is over its texts."""
        assert soft_tokens is not None  # `check` refuses to train none
        texts, parts = len(grid.text), []
        for rows in torch.arange(len(grid), device=self.device).split(max(1, self.pairs_per_pass // texts)):
            parts.append(self._rows(grid, soft_tokens, rows))
        errors = torch.cat(parts)
        losses = softrepa_loss(errors, grid.own, self.scale, self.temperature)
        own = errors.gather(1, grid.own[:, None]).squeeze(1)
        others = (errors.sum() - own.sum()) / max(errors.numel() - len(own), 1)
        return {
            "train/loss": mean_over(losses) + self.denoising_weight * mean_over(own),
            "train/contrastive_loss": mean_over(losses),
            "train/contrastive_floor": softrepa_floor(texts, self.scale),
            "train/rank1": mean_over((errors.argmin(dim=1) == grid.own).float()),
            "train/error_own": mean_over(own),
            "train/error_others": float(others),
        }

    def _rows(self, grid: Grid, soft_tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Backward for a few images under all texts; their errors `(r, B)`."""
        images, texts = all_pairs(rows, len(grid.text))
        slices = list(self.passes(images, texts))
        if len(slices) == 1:
            errors = self._errors(grid, soft_tokens, images, texts).view(len(rows), -1)
            self._loss(errors, grid, rows).backward()
            return errors.detach()
        # A row that is too long for one pass is computed twice. The loss of an image mixes the errors under all its
        # texts, so its slope in each error is known only once all of them are: they come first, without a graph. Then
        # each part is computed again with its graph and goes backward by its own slopes (the chain rule).
        with torch.no_grad():
            errors = torch.cat([self._errors(grid, soft_tokens, images[part], texts[part]) for part in slices])
        errors = errors.view(len(rows), -1).requires_grad_()
        (slopes,) = torch.autograd.grad(self._loss(errors, grid, rows), errors)
        for part in slices:
            errors_again = self._errors(grid, soft_tokens, images[part], texts[part])
            (errors_again * slopes.flatten()[part]).sum().backward()
        return errors.detach()

    def _errors(self, grid: Grid, soft_tokens: torch.Tensor, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return pair_errors(self.predict(grid, soft_tokens, images, texts), grid.target[images])

    def _loss(self, errors: torch.Tensor, grid: Grid, rows: torch.Tensor) -> torch.Tensor:
        """This rank's share of the mean over images; ranks are averaged when gradients meet."""
        own = grid.own[rows]
        loss = softrepa_loss(errors, own, self.scale, self.temperature).sum()
        if self.denoising_weight:
            loss = loss + self.denoising_weight * errors.gather(1, own[:, None]).sum()
        return loss / len(grid)
