"""AGSM: soft tokens regress to targets moved along the alignment guidance of their own average (arXiv 2605.30038)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Decay, Positive, Weight, Whole, check_arguments
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.pairs.base import OF_TOKENS, Grid, PairMethod, all_pairs, frozen_copy, mean_over
from t2i_rl.methods.pairs.loss import REDUCTIONS, agsm_targets, alignment_guidance, pair_errors
from t2i_rl.models.diffusion.base import LatentDiffusion
from t2i_rl.models.diffusion.soft_tokens import SoftTokens

POSITIVE, NEGATIVE = 0, 1
OWN = (
    *("gamma_positive", "gamma_negative", "reduction", "temperature"),
    *("average_decay", "average_init", "negatives", "null_branch"),
)


class AGSM(PairMethod):
    """An image's own text regresses to `target + gamma_positive * delta` with the positive tokens, every other text to
    `target - gamma_negative * delta` with the negative ones; `delta` comes from a slow average of the same tokens.
    Pictures are drawn with the positive tokens alone.

    Args:
        variant: a name for these settings, which is written down with them: that of conf/variant, where a config made
            this (docs/alignment.md). It decides nothing.
        gamma_positive, gamma_negative: how far targets move.
        reduction, temperature: of the errors in the Plackett-Luce weights, see `alignment_guidance`.
        average_decay, average_init: of the average, float32; it starts as a `copy`, or `independent` of the bank (as
            released).
        negatives: `equation` regresses the other texts whatever gamma is; `off_at_zero` leaves them out at
            `gamma_negative=0` (as released).
        null_branch: the bank that the empty prompt reads while drawing; None: the positive one, like every other
            prompt.
        options: see `PairMethod`.
    """

    branches = 2
    bank: SoftTokens  # `check` refuses to train none

    def __init__(
        self,
        model: LatentDiffusion,
        optimizer: partial,
        variant: str = "ours",
        gamma_positive: Weight = 1.0,
        gamma_negative: Weight = 0.1,
        reduction: str = "mean",
        temperature: Positive = 0.1,
        average_decay: Decay = 0.999,
        average_init: str = "copy",
        negatives: str = "equation",
        null_branch: Whole | None = None,
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
        self.gamma_positive, self.gamma_negative = own["gamma_positive"], own["gamma_negative"]
        self.reduction, self.temperature = own["reduction"], own["temperature"]
        self.average_decay = own["average_decay"]
        self.trains_negatives = not (own["negatives"] == "off_at_zero" and self.gamma_negative == 0)
        self.settings = {"variant": variant, **own, **settings}
        assert model.attached is not None  # `PairMethod` attached the bank
        model.attached.null_branch = own["null_branch"]
        if own["average_init"] == "independent":
            draws = torch.Generator().manual_seed(derive_seed(self.seed, "average"))
            self.average = SoftTokens(self.bank.spec, generator=draws).requires_grad_(False)
        else:
            self.average = frozen_copy(self.bank)

    @staticmethod
    def check(options: Mapping) -> None:
        choices = {
            "reduction": REDUCTIONS,
            "average_init": ("copy", "independent"),
            "negatives": ("equation", "off_at_zero"),
        }
        for name, allowed in choices.items():
            if options.get(name) not in (None, *allowed):
                raise UserError(f"method.{name} must be one of {', '.join(allowed)}, not {options[name]!r}")
        if options.get("null_branch") not in (None, POSITIVE, NEGATIVE):
            raise UserError(f"method.null_branch must be {POSITIVE} or {NEGATIVE}, not {options['null_branch']}")
        if options.get("tokens") == 0:
            raise UserError("method.tokens=0 trains nothing: AGSM learns soft tokens")
        check_arguments(AGSM, options, "method")
        PairMethod.check(options)

    @torch.no_grad()
    def after_step(self) -> None:
        """The average follows the bank."""
        for mean, learnt in zip(self.average.parameters(), self.bank.parameters(), strict=True):
            mean.lerp_(learnt, 1 - self.average_decay)

    def accumulate(self, grid: Grid, soft_tokens: torch.Tensor | None) -> dict[str, float]:
        """A few images at a time under all texts, since a row's weights are a softmax over its texts."""
        assert soft_tokens is not None  # `check` refuses to train none
        with torch.no_grad():
            averaged = self.emit(self.average, grid.t)
        texts, parts = len(grid.text), []
        for rows in torch.arange(len(grid), device=self.device).split(max(1, self.pairs_per_pass // texts)):
            parts.append(self._rows(grid, soft_tokens, averaged, rows))
        weights, errors, sizes = (torch.cat(part) for part in zip(*parts, strict=True))
        positive = torch.nn.functional.one_hot(grid.own, texts).bool()
        own, best_other = weights[positive], weights.masked_fill(positive, -1.0).amax(dim=1)
        loss_positive, loss_negative = mean_over(errors[positive]), mean_over(errors[~positive]) if texts > 1 else 0.0
        return {
            "train/loss": loss_positive + (loss_negative if self.trains_negatives else 0.0),
            "train/loss_positive": loss_positive,
            "train/loss_negative": loss_negative,
            "train/weight_own": mean_over(own),
            "train/winrate": mean_over((own > best_other).float()),
            "train/margin": mean_over(own - best_other),
            "train/delta_own": mean_over(sizes[positive]),
        }

    def _rows(
        self, grid: Grid, soft_tokens: torch.Tensor, averaged: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Backward for a few images under all texts; weights, errors and mean squared deltas, each `(r, B)`."""
        images, texts = all_pairs(rows, len(grid.text))
        positive = texts == grid.own[images]
        branch = torch.where(positive, POSITIVE, NEGATIVE)
        with torch.no_grad():
            parts = [
                self.predict(grid, averaged, images[part], texts[part], branch[part])
                for part in self.passes(images, texts)
            ]
            reference = torch.cat(parts).unflatten(0, (len(rows), -1))
            weights, delta = alignment_guidance(reference, grid.target[rows], self.temperature, self.reduction)
            targets = agsm_targets(grid.target[rows], delta, grid.own[rows], self.gamma_positive, self.gamma_negative)
            targets = targets.flatten(0, 1)
        # The loss is the mean error of the matching pairs plus the mean error of all other pairs (Alg. 1). Passes add
        # up, so each pair counts with its share of its own mean: one of `len(grid)` matching pairs, or one of the
        # others, of which every image has one fewer than there are texts.
        others = max(len(grid) * (len(grid.text) - 1), 1)
        share = positive.to(targets) / len(grid) + (~positive).to(targets) / others
        errors = torch.zeros_like(share)
        trained = torch.arange(len(images), device=self.device)
        if not self.trains_negatives:
            trained = trained[positive]
        for part in self.passes(trained, trained):
            chosen = trained[part]
            predicted = self.predict(grid, soft_tokens, images[chosen], texts[chosen], branch[chosen])
            errors_now = pair_errors(predicted, targets[chosen])
            (errors_now * share[chosen]).sum().backward()
            errors[chosen] = errors_now.detach()
        return weights, errors.view(len(rows), -1), delta.square().mean(dim=(2, 3, 4))
