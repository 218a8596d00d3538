"""Teacher-forced scoring: a forward for the plan, one for the image, heads chunk by chunk."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from t2i_rl.core.errors import UserError
from t2i_rl.models.autoregressive.engine.rows import guided, positions, unconditional
from t2i_rl.models.autoregressive.engine.stats import TokenStats, token_stats

DISTRIBUTIONS = ("conditional", "guided", "guided_detach_uncond")
CHUNK_BYTES = 2**28  # of float32 logits alive at a time: 655 positions of a vocabulary of 102,400


def score_text(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    token_mask: torch.Tensor,
    temperature: float = 1.0,
) -> TokenStats:
    """Statistics of plan tokens `(B, T)` after left-padded prompts `(B, P)`.

    Tokens past a row's end are masked out.
    """
    embeds = model.get_input_embeddings()(torch.cat([ids, tokens[:, :-1]], dim=1))
    hidden = _hidden(model, embeds, torch.cat([mask, token_mask[:, :-1].to(mask)], dim=1), tokens.shape[1])
    vocabulary = model.config.text_config.vocab_size
    return stats_in_chunks(model.lm_head, vocabulary, hidden[token_mask], tokens, token_mask, temperature)


def score_image(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    *,
    special: dict[str, int],
    distribution: str,
    guidance_scale: float,
    temperature: float = 1.0,
) -> TokenStats:
    """Statistics of image tokens `(B, N)` after prompts that end in the begin-of-image token.

    `distribution` says whose: `conditional` (no guidance, as T2I-R1 differentiates), `guided` (the
    distribution that was sampled), or `guided_detach_uncond` (same values, gradient through the
    conditional branch only).

    Raises:
        UserError: an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"logprob must be one of {', '.join(DISTRIBUTIONS)}, not {distribution!r}")
    image = model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    scale = 1.0 if distribution == "conditional" else guidance_scale
    if scale != 1:
        ids = torch.cat([ids, unconditional(ids, special)])
        mask, image = torch.cat([mask, mask]), torch.cat([image, image])
    embeds = torch.cat([model.get_input_embeddings()(ids), image], dim=1)
    full_mask = torch.cat([mask, torch.ones_like(image[:, :, 0]).to(mask)], dim=1)
    hidden = _hidden(model, embeds, full_mask, tokens.shape[1]).unflatten(0, (-1, len(tokens)))

    def head(states: torch.Tensor) -> torch.Tensor:
        """Logits `(n, codes)` of states `(n, branches, D)`, of which one chunk comes at a time."""
        logits = model.model.generation_head(states.transpose(0, 1).flatten(0, 1)).float()
        guidance = () if scale == 1 else (scale,)
        return guided(logits, guidance, detach_uncond=distribution == "guided_detach_uncond")

    codes, all_tokens = model.config.vq_config.num_embeddings, torch.ones_like(tokens, dtype=torch.bool)
    return stats_in_chunks(head, codes, hidden.flatten(1, 2).transpose(0, 1), tokens, all_tokens, temperature)


def stats_in_chunks(
    head: Callable, vocabulary: int, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, temperature: float
) -> TokenStats:
    """Statistics of `tokens[mask]`, predicted by `hidden` `(mask.sum(), ...)` through `head`.
    Logits exist for one chunk at a time: where a gradient is wanted and there is more than one,
    each is computed again on the way back."""
    targets = tokens[mask]

    def part(states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stats = token_stats(head(states), targets, torch.ones_like(targets, dtype=torch.bool), temperature)
        return stats.logprobs, stats.self_certainty, stats.entropy

    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    recompute = torch.is_grad_enabled() and len(targets) > size
    chunks = [
        checkpoint(part, *chunk, use_reentrant=False) if recompute else part(*chunk)
        for chunk in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    empty = torch.zeros(mask.shape, device=mask.device)
    return TokenStats(*(empty.masked_scatter(mask, torch.cat(values)) for values in zip(*chunks)), mask)


def _hidden(model: Any, embeds: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """Hidden states `(B, length, D)` that predict the last `length` tokens."""
    output = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions(mask), use_cache=False
    )
    return output.last_hidden_state[:, -length:]
