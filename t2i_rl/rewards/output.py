"""What every reward returns, and the check that it is a number."""

from dataclasses import dataclass, field

import torch


@dataclass
class RewardOutput:
    """`total` `(B,)` is what is trained on; `parts` `(B,)` each are logged beside it."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


def checked(output: RewardOutput, rows: int, name: str) -> RewardOutput:
    """The output, if it is one finite number a row.

    Raises:
        ValueError: a wrong shape, or a value that is not finite: a reward that failed never becomes a number.
    """
    for key, value in {"total": output.total, **output.parts}.items():
        if value.shape != (rows,):
            raise ValueError(f"reward {name}: {key} has shape {tuple(value.shape)}, expected ({rows},)")
        if not torch.isfinite(value).all():
            raise ValueError(
                f"reward {name}: {key} is not finite in {int((~torch.isfinite(value)).sum())} of {rows} rows"
            )
    return output
