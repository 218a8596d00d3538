"""The control that SoftREPA and AGSM owe: the same soft tokens, or adapters of the same size, under the plain denoising loss."""

from collections.abc import Mapping
from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model

from t2i_rl.errors import UserError
from t2i_rl.methods.alignment_loss import pair_errors
from t2i_rl.methods.pairs import Grid, PairMethod, mean_over
from t2i_rl.models.diffusion import LatentDiffusion
from t2i_rl.seeding import derive_seed


class Denoising(PairMethod):
    """Mean squared error of matching pairs.

    Args:
        lora: arguments of peft's LoraConfig: adapters in the denoiser learn in place of tokens (then `tokens=0`).
        options: see `PairMethod`.
    """

    def __init__(
        self, model: LatentDiffusion, optimizer: partial, tokens: int = 4, lora: dict | None = None, **options
    ):
        self.check({"tokens": tokens, "lora": lora, **options})
        super().__init__(model, optimizer, tokens=tokens, **options)
        self.settings = {"tokens": tokens, "lora": lora}
        if lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, "adapters"))
                inject_adapter_in_model(LoraConfig(**lora), model.denoiser)
            for parameter in model.denoiser.parameters():
                if parameter.requires_grad:  # adapters learn in float32 whatever they are added to
                    parameter.data = parameter.data.float()

    @staticmethod
    def check(options: Mapping) -> None:
        if bool(options.get("tokens")) == (options.get("lora") is not None):
            raise UserError(
                "method=denoising trains either soft tokens (method.tokens=4) or adapters (method.lora={r: 4} method.tokens=0)"
            )
        try:
            LoraConfig(**(options.get("lora") or {}))
        except (TypeError, ValueError) as error:
            raise UserError(f"method.lora: {error}") from error
        PairMethod.check(options)

    def accumulate(self, grid: Grid, tokens: torch.Tensor | None) -> dict[str, float]:
        rows = torch.arange(len(grid), device=self.device)
        slices, errors = list(self.passes(rows, rows)), []
        for number, part in enumerate(slices, start=1):
            found = pair_errors(self.predict(grid, tokens, rows[part], grid.own[part]), grid.target[part])
            self.backward_pass(found.sum() / len(grid), tokens, last=number == len(slices))
            errors.append(found.detach())
        return {"train/loss": mean_over(torch.cat(errors))}
