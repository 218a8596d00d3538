"""The control that SoftREPA and AGSM owe: soft tokens, or as many adapters, under the plain denoising loss."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Whole
from t2i_rl.methods.pairs.base import Grid, PairMethod, adapt, check_lora, mean_over
from t2i_rl.methods.pairs.loss import pair_errors
from t2i_rl.models.diffusion.base import LatentDiffusion


class Denoising(PairMethod):
    """Mean squared error of matching pairs.

    Args:
        lora: arguments of peft's LoraConfig: adapters in the denoiser learn in place of tokens (then `tokens=0`).
        options: see `PairMethod`.
    """

    contrasts = False

    def __init__(
        self, model: LatentDiffusion, optimizer: partial, tokens: Whole = 4, lora: dict | None = None, **options: Any
    ):
        self.check({"tokens": tokens, "lora": lora, **options})
        super().__init__(model, optimizer, tokens=tokens, **options)
        self.settings = {"tokens": tokens, "lora": lora}
        if lora is not None:
            adapt(model.denoiser, lora, self.seed)

    @staticmethod
    def check(options: Mapping) -> None:
        if bool(options.get("tokens")) == (options.get("lora") is not None):
            raise UserError(
                "method=denoising trains either soft tokens (method.tokens=4) or adapters (method.lora={r: 4} "
                "method.tokens=0)"
            )
        check_lora(options.get("lora"))
        PairMethod.check(options)

    def accumulate(self, grid: Grid, soft_tokens: torch.Tensor | None) -> dict[str, float]:
        rows = torch.arange(len(grid), device=self.device)
        slices, parts = list(self.passes(rows, rows)), []
        for number, part in enumerate(slices, start=1):
            errors = pair_errors(self.predict(grid, soft_tokens, rows[part], grid.own[part]), grid.target[part])
            self.backward_pass(errors.sum() / len(grid), soft_tokens, last=number == len(slices))
            parts.append(errors.detach())
        return {"train/loss": mean_over(torch.cat(parts))}
