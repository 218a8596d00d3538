"""What an optimizer step may be given: options that torch takes, and a gradient that is finite."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import LearningRate, check_value


def check_optimizer(optimizer: partial, scheduler: partial | None) -> None:
    """Refuse options that torch's own classes refuse, and a rate at which weights would jump.

    Raises:
        UserError: what they say, or what the rate must be.
    """
    try:
        trial = optimizer([nn.Parameter(torch.zeros(1))])
        if scheduler is not None:
            scheduler(trial)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"method.optimizer or method.scheduler: {error}") from error
    check_value(trial.defaults["lr"], LearningRate, "method.optimizer.lr")


class NonFinite:
    """What becomes of an optimizer step whose gradient is not finite: the run ends with a line (`raise`), or goes on
    without it (`skip`).

    Every rank decides alike. A skipped step changes no weight, no optimizer state and no schedule, and is counted; the
    next one has other data. `MOST_IN_A_ROW` of them end the run: then it is not a step that is broken but the weights.

    Raises:
        UserError: an unknown choice.
    """

    CHOICES = ("raise", "skip")
    MOST_IN_A_ROW = 10

    def __init__(self, choice: str):
        self.check(choice)
        self.choice, self.skipped, self.in_a_row = choice, 0, 0

    @classmethod
    def check(cls, choice: str) -> None:
        if choice not in cls.CHOICES:
            raise UserError(f"method.on_nonfinite must be one of {', '.join(cls.CHOICES)}, not {choice!r}")

    def allows(self, norm: torch.Tensor, step: int) -> bool:
        """Whether the optimizer may step with a gradient of this norm.

        Raises:
            UserError: it may not, and such steps are not skipped, or were too many in a row.
        """
        finite = torch.isfinite(norm.detach()).to(torch.int32)
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite:
            self.in_a_row = 0
            return True
        if self.choice == "raise":
            raise UserError(
                f"the gradient's norm is {norm.item()} at optimizer step {step}, and no weight was changed: go on from "
                "the last checkpoint with ckpt_path=last method.on_nonfinite=skip, which leaves such steps out and "
                "counts them, or lower method.optimizer.lr (docs/metrics.md)"
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.MOST_IN_A_ROW:
            raise UserError(
                f"the gradient was not finite in {self.in_a_row} steps in a row, up to optimizer step {step}: the "
                "weights themselves are past mending; go on from an earlier checkpoint "
                "(callbacks.checkpoint.keep_every_n_steps keeps them) with a lower method.optimizer.lr"
            )
        return False

    def metrics(self) -> dict[str, float]:
        """How many steps were left out so far, where they are left out."""
        return {"train/skipped_steps": float(self.skipped)} if self.choice == "skip" else {}
