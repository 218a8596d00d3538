"""SoftREPA: soft tokens that make each image denoise best under its own text (arXiv 2503.08250)."""

from collections.abc import Mapping
from functools import partial

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Positive, Weight, Whole, check_arguments
from t2i_rl.methods.pairs.base import Grid, PairMethod, all_pairs, mean_over
from t2i_rl.methods.pairs.loss import pair_errors, softrepa_floor, softrepa_loss
from t2i_rl.methods.pairs.presets import VARIANTS, settings_of
from t2i_rl.models.diffusion.base import LatentDiffusion


class SoftREPA(PairMethod):
    """Cross-entropy over texts of `scale * exp(-error / temperature)`, where `error` is the denoising error under each text.

    Args:
        variant: `ours`, `paper` or `released`: decides the settings that are not given (conf/method/variant,
            docs/alignment.md).
        scale, temperature: of the logits; the released constants are 4 and 0.07, the paper's formula has no scale.
        denoising_weight: of the plain denoising error of matching pairs.
        options: see `PairMethod`.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        optimizer: partial,
        variant: str = "ours",
        scale: Positive | None = None,
        temperature: Positive | None = None,
        denoising_weight: Weight | None = None,
        tokens: Count | None = None,
        layers: Count | list[str] | None = None,
        buckets: Whole | None = None,
        position: str | None = None,
        init: str | None = None,
        times: str | None = None,
        noise: str | None = None,
        **options,
    ):
        given = {
            "scale": scale, "temperature": temperature, "denoising_weight": denoising_weight, "tokens": tokens, "layers": layers,
            "buckets": buckets, "position": position, "init": init, "times": times, "noise": noise,
        }  # fmt: skip
        settings = settings_of("softrepa", variant, model.kind, given)
        self.check({"variant": variant, **settings, **options})
        own = {name: settings.pop(name) for name in ("scale", "temperature", "denoising_weight")}
        super().__init__(model, optimizer, **settings, **options)
        self.scale, self.temperature, self.denoising_weight = own.values()
        self.settings = {"variant": variant, **own, **settings}

    @staticmethod
    def check(options: Mapping) -> None:
        if options["variant"] not in VARIANTS:
            raise UserError(f"variant must be one of {', '.join(VARIANTS)}, not {options['variant']!r}")
        if options.get("tokens") == 0:
            raise UserError("method.tokens=0 trains nothing: SoftREPA learns soft tokens")
        check_arguments(SoftREPA, options, "method")
        PairMethod.check(options)

    def accumulate(self, grid: Grid, tokens: torch.Tensor) -> dict[str, float]:
        texts, columns = len(grid.text), []
        for rows in torch.arange(len(grid), device=self.device).split(max(1, self.pairs_per_pass // texts)):
            columns.append(self._rows(grid, tokens, rows))
        errors = torch.cat(columns)
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

    def _rows(self, grid: Grid, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Backward for a few images under all texts; their errors `(r, B)`. A row that is too long for one pass takes two:
        all its errors first, then, with the loss's slopes known, each part's gradient."""
        images, texts = all_pairs(rows, len(grid.text))
        slices = list(self.passes(images, texts))
        if len(slices) == 1:
            errors = self._errors(grid, tokens, images, texts).view(len(rows), -1)
            self._loss(errors, grid, rows).backward()
            return errors.detach()
        with torch.no_grad():
            errors = torch.cat([self._errors(grid, tokens, images[part], texts[part]) for part in slices])
        errors = errors.view(len(rows), -1).requires_grad_()
        (slopes,) = torch.autograd.grad(self._loss(errors, grid, rows), errors)
        for part in slices:
            again = self._errors(grid, tokens, images[part], texts[part])
            (again * slopes.flatten()[part]).sum().backward()
        return errors.detach()

    def _errors(self, grid: Grid, tokens: torch.Tensor, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return pair_errors(self.predict(grid, tokens, images, texts), grid.target[images])

    def _loss(self, errors: torch.Tensor, grid: Grid, rows: torch.Tensor) -> torch.Tensor:
        """This rank's share of the mean over images; ranks are averaged when gradients meet."""
        own = grid.own[rows]
        loss = softrepa_loss(errors, own, self.scale, self.temperature).sum()
        if self.denoising_weight:
            loss = loss + self.denoising_weight * errors.gather(1, own[:, None]).sum()
        return loss / len(grid)
