"""Reading a yes or a no off a next-token distribution."""

from typing import Any

import torch

from t2i_rl.core.errors import UserError


def single_token(tokenizer: Any, word: str, path: str) -> int:
    """The id of a word that is one token.

    Raises:
        UserError: it is not.
    """
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"the tokenizer of {path} has no single token for {word!r}: it cannot answer yes or no")
    return ids[0]


def yes_share(logits: torch.Tensor, yes: int, no: int, temperature: float = 1.0) -> torch.Tensor:
    """P(yes) / (P(yes) + P(no)) `(B,)` in float64 of next-token logits `(B, V)`.

    It is computed as a logistic of their difference, so that it is never 0 / 0.

    Raises:
        UserError: logits that are not numbers.
    """
    answers = logits[:, [yes, no]].double().cpu()
    if not torch.isfinite(answers).all():
        raise UserError(
            "the judge's logits for yes and no are not finite: take reward.dtype=float32 (or bfloat16, not float16)"
        )
    return ((answers[:, 0] - answers[:, 1]) / temperature).sigmoid()
