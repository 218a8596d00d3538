"""The control that SoftREPA and AGSM owe: the same soft tokens, or adapters of the same size, under the plain denoising loss."""

from collections.abc import Mapping
from functools import partial

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Whole
from t2i_rl.methods.pairs.base import Grid, PairMethod, add_adapters, check_lora, mean_over
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
        self, model: LatentDiffusion, optimizer: partial, tokens: Whole = 4, lora: dict | None = None, **options
    ):
        self.check({"tokens": tokens, "lora": lora, **options})
        super().__init__(model, optimizer, tokens=tokens, **options)
        self.settings = {"tokens": tokens, "lora": lora}
        if lora is not None:
            add_adapters(model.denoiser, lora, self.seed)

    @staticmethod
    def check(options: Mapping) -> None:
        if bool(options.get("tokens")) == (options.get("lora") is not None):
            raise UserError(
                "method=denoising trains either soft tokens (method.tokens=4) or adapters (method.lora={r: 4} method.tokens=0)"
            )
        check_lora(options.get("lora"))
        PairMethod.check(options)

    def accumulate(self, grid: Grid, tokens: torch.Tensor | None) -> dict[str, float]:
        rows = torch.arange(len(grid), device=self.device)
        slices, errors = list(self.passes(rows, rows)), []
        for number, part in enumerate(slices, start=1):
            found = pair_errors(self.predict(grid, tokens, rows[part], grid.own[part]), grid.target[part])
            self.backward_pass(found.sum() / len(grid), tokens, last=number == len(slices))
            errors.append(found.detach())
        return {"train/loss": mean_over(torch.cat(errors))}
