"""Teacher-forced scoring: one forward for the plan, one for the image, heads applied at completion positions only."""

import torch

from t2i_rl.errors import UserError
from t2i_rl.rollout.decode import guided, positions, unconditional
from t2i_rl.rollout.stats import TokenStats, token_stats

DISTRIBUTIONS = ("conditional", "guided", "guided_detach_uncond")


def score_text(
    model,
    ids: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    token_mask: torch.Tensor,
    temperature: float = 1.0,
) -> TokenStats:
    """Statistics of plan tokens `(B, T)` after left-padded prompts `(B, P)`; tokens past a row's end are masked out."""
    embeds = model.get_input_embeddings()(torch.cat([ids, tokens[:, :-1]], dim=1))
    hidden = _hidden(model, embeds, torch.cat([mask, token_mask[:, :-1].to(mask)], dim=1), tokens.shape[1])
    return token_stats(model.lm_head(hidden), tokens, token_mask, temperature)


def score_image(
    model,
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

    `distribution` says whose: `conditional` (no guidance, as T2I-R1 differentiates), `guided` (the distribution that was sampled),
    or `guided_detach_uncond` (same values, gradient through the conditional branch only).

    Raises:
        UserError: an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"logprob must be one of {', '.join(DISTRIBUTIONS)}, not {distribution!r}")
    image = model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    scale = 1.0 if distribution == "conditional" else guidance_scale
    if scale != 1:
        ids, mask, image = (
            torch.cat([ids, unconditional(ids, special)]),
            torch.cat([mask, mask]),
            torch.cat([image, image]),
        )
    embeds = torch.cat([model.get_input_embeddings()(ids), image], dim=1)
    full_mask = torch.cat([mask, torch.ones_like(image[:, :, 0]).to(mask)], dim=1)
    logits = model.model.generation_head(_hidden(model, embeds, full_mask, tokens.shape[1])).float()
    logits = guided(logits, scale, detach_uncond=distribution == "guided_detach_uncond")
    return token_stats(logits, tokens, torch.ones_like(tokens, dtype=torch.bool), temperature)


def _hidden(model, embeds: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """Hidden states `(B, length, D)` that predict the last `length` tokens."""
    output = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions(mask), use_cache=False
    )
    return output.last_hidden_state[:, -length:]
