"""One rollout: everything that sampling and scoring leave behind for rewards and updates."""

from dataclasses import dataclass, fields

import numpy as np
import torch

from t2i_rl.prompts import Prompt
from t2i_rl.rollout.decode import DecodedImages
from t2i_rl.rollout.stats import TokenStats


@dataclass
class Rollout:
    """`B = P * group_size` rows, the rows of a group adjacent. Without plans the text fields are None and `plans` are empty strings.

    plan_ids, plan_mask: phase-1 conversations `(B, L1)`; plan_tokens, plan_token_mask: the plans `(B, T)`; plan_truncated `(B,)`: no EOS within the limit.
    image_ids, image_mask: phase-2 conversations `(B, L2)`; image_tokens `(B, N)`.
    drawn: what was seen while the image tokens were drawn, see `DecodedImages`.
    text_stats, image_stats: teacher-forced statistics of the rollout policy, no gradient.
    text_vocabulary, image_vocabulary: how many entries the two heads have.
    images: uint8 `(B, H, W, 3)`, only where something asked for pictures.
    """

    prompts: list[Prompt]
    group_size: int
    seeds: list[int]
    plans: list[str]
    image_ids: torch.Tensor
    image_mask: torch.Tensor
    image_tokens: torch.Tensor
    drawn: DecodedImages
    text_vocabulary: int
    image_vocabulary: int
    plan_ids: torch.Tensor | None = None
    plan_mask: torch.Tensor | None = None
    plan_tokens: torch.Tensor | None = None
    plan_token_mask: torch.Tensor | None = None
    plan_truncated: torch.Tensor | None = None
    text_stats: TokenStats | None = None
    image_stats: TokenStats | None = None
    images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, chosen: slice) -> "Rollout":
        """The same rollout for some rows only, as one micro-batch."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, part in parts.items():
            if isinstance(part, (TokenStats, DecodedImages)):
                parts[name] = type(part)(*(getattr(part, field.name)[chosen] for field in fields(part)))
            elif isinstance(part, (list, torch.Tensor, np.ndarray)):
                parts[name] = part[chosen]
        return Rollout(**parts)
