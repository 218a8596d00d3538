"""A check that what goes on is finite: a NaN as a byte is black, and would be scored."""

from collections.abc import Iterable, Mapping

import torch

from t2i_rl.core.errors import UserError

BROKEN_FILE = "the file is broken, or a training ran away; take another checkpoint"
RAN_AWAY = "the update ran away, so lower method.optimizer.lr; the checkpoint before this one is kept"


def check_finite(values: torch.Tensor, subject: str, fix: str) -> None:
    """Let finite values through; it costs one look at the device.

    Args:
        subject: names the values in the plural.
        fix: the usual cause and what to change.

    Raises:
        UserError: a value is NaN or infinite.
    """
    if values.device.type != "meta" and not torch.isfinite(values).all():
        raise UserError(f"{subject} are not finite: {fix}")


def check_weights(weights: Iterable[tuple[str, torch.Tensor]], where: str, fix: str = BROKEN_FILE) -> None:
    """Let named weights through, if all are finite.

    Args:
        where: what holds them, as the line begins.
        fix: the usual cause and what to change.

    Raises:
        UserError: a weight is NaN or infinite; the line names the first.
    """
    for name, weight in weights:
        if weight.is_floating_point() and weight.device.type != "meta" and not _all_finite(weight.detach()):
            raise UserError(f"{where} holds weights that are not finite (the first is {name}): {fix}")


def check_checkpoint(checkpoint: Mapping, where: str, fix: str = BROKEN_FILE) -> None:
    """Let a training checkpoint through, if what it learnt is finite, averages included.

    Raises:
        UserError: a weight is not, see `check_weights`.
    """
    for weights in (checkpoint.get("state_dict", {}), checkpoint.get("irg", {}).get("average", {})):
        check_weights(weights.items(), where, fix)


def _all_finite(weight: torch.Tensor) -> bool:
    """Whether every value is; a finite sum in float32 tells so without a copy of the weight."""
    return bool(torch.isfinite(weight.sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())
