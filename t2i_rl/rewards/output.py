"""What every reward returns, and the check that it is a number."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from t2i_rl.errors import UserError

LOGGED = ("total", "group_std", "zero_std_ratio", "plan_length_correlation")  # as `reward/<name>`, beside the parts


@dataclass
class RewardOutput:
    """`total` `(B,)` is what is trained on; `parts` `(B,)` each are logged beside it."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


def checked(output: RewardOutput, rows: int, name: str) -> RewardOutput:
    """The output without gradients, if it is one finite number a row.

    Raises:
        UserError: another type, a wrong shape, or a value that is not finite: a reward that failed never becomes a
            number.
    """
    if not isinstance(output, RewardOutput):
        raise UserError(f"reward {name} must return a RewardOutput(total, parts), not a {type(output).__name__}")
    if not isinstance(output.parts, Mapping) or not all(isinstance(part, str) for part in output.parts):
        raise UserError(f"reward {name}: parts must be tensors by name, not a {type(output.parts).__name__}")
    taken = next((part for part in output.parts if part in LOGGED), None)
    if taken:
        raise UserError(f"reward {name}: a part cannot be called {taken!r}, which is logged as reward/{taken} already")
    for key, value in [("total", output.total), *output.parts.items()]:
        _check_numbers(value, rows, f"reward {name}: {key}")
    return RewardOutput(output.total.detach(), {part: value.detach() for part, value in output.parts.items()})


def _check_numbers(value: torch.Tensor, rows: int, what: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{what} must be a tensor of {rows} numbers, one a row, not a {type(value).__name__}")
    if value.is_complex():
        raise UserError(f"{what} must be real numbers, not {str(value.dtype).removeprefix('torch.')}")
    if value.shape != (rows,):
        raise UserError(f"{what} has shape {tuple(value.shape)}, expected ({rows},): one number a row")
    bad = ~(value.double().abs() <= torch.finfo(torch.float32).max)  # advantages are float32
    if bad.any():
        raise UserError(
            f"{what} is not finite in {int(bad.sum())} of {rows} rows (first: row {int(bad.nonzero()[0])}, "
            f"{value[bad][0].item()})"
        )
