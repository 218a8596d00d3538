"""What passes between drawing, scoring, updating and logging: actions and their log-probs, updates, one whole step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from t2i_rl.core.contracts import Drawn, RewardOutput

Rollout = TypeVar("Rollout", bound=Drawn)


@dataclass
class Actions:
    """The actions of one pass, scored by one model: `R` rows of `T` actions.

    logprobs: `(R, T)`, with a gradient where grad mode is on.
    mask: `(R, T)` bool, False for padding, whose log-probs may be anything.
    owner: `(R,)` long, the row of the rollout that each row belongs to, and whose advantage it has.
    kinds: which part of `(R, T)` each kind of action is, by its name in `loss_weights`, as an index.
    zero: 0, with a gradient of 0 for parameters that some passes use and others do not: ranks add up the gradients of
        the same parameters, and would wait for one that is missing.
    """

    logprobs: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor
    kinds: Mapping[str, slice | tuple[slice, ...]]
    zero: torch.Tensor | float = 0.0


@dataclass
class PassRecord:
    """What one pass of an update is logged by, without gradient.

    actions: as the rollout policy scored them. objective: this pass's share of the loss that was differentiated.
    loss, kl, ratio: per action `(R, T)`: the clipped surrogate, the k3 KL, the importance ratio.
    """

    actions: Actions
    objective: torch.Tensor
    loss: torch.Tensor
    kl: torch.Tensor
    ratio: torch.Tensor


@dataclass
class Update:
    """One optimizer step: its passes, the norm of its gradient, and the total weight of the actions of all ranks,
    divided by their number."""

    passes: list[PassRecord]
    norm: torch.Tensor
    total: torch.Tensor


@dataclass
class Step(Generic[Rollout]):
    """One rollout and its updates, as they are logged. `seconds` of each part by name."""

    rollout: Rollout
    reward: RewardOutput
    watched: dict[str, RewardOutput]
    advantages: torch.Tensor
    updates: list[Update]
    seconds: dict[str, float] = field(default_factory=dict)
