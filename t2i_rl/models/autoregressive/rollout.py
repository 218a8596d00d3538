"""What an autoregressive model drew, with all that rewards and updates read of it."""

from dataclasses import dataclass

import torch

from t2i_rl.core.contracts import Drawn
from t2i_rl.models.autoregressive.engine.decode import DecodedImages
from t2i_rl.models.autoregressive.engine.stats import TokenStats


@dataclass(kw_only=True)
class TokenRollout(Drawn):
    """`B = P * group_size` rows of tokens. Without plans the text fields are None.

    plan_ids, plan_mask: phase-1 conversations `(B, L1)`.
    plan_tokens, plan_token_mask: the plans `(B, T)`.
    plan_truncated: `(B,)`, no EOS within the limit.
    image_ids, image_mask: phase-2 conversations `(B, L2)`.
    image_tokens: `(B, N)`.
    drawn: what was seen while the image tokens were drawn, see `DecodedImages`.
    text_stats, image_stats: teacher-forced statistics of the rollout policy, no gradient.
    text_vocabulary, image_vocabulary: how many entries the two heads have.
    """

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
