"""Cached decoding: plans from the language head, images from the generation head under classifier-free guidance."""

import torch
from transformers import DynamicCache

from t2i_rl.rollout.stats import sample_tokens
from t2i_rl.seeding import row_uniforms


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only, so that padding moves nothing (spec trap 7)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class Decoder:
    """A language model fed one step at a time over left-padded rows; keeps the cache, the mask and the positions."""

    def __init__(self, language_model, embeds: torch.Tensor, mask: torch.Tensor):
        self.model, self.mask, self.cache = language_model, mask, DynamicCache()
        self.hidden = self._forward(embeds, positions(mask))

    def step(self, embeds: torch.Tensor) -> None:
        """Append one embedding `(B, 1, D)` a row; `hidden` `(B, D)` is then the newest state."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.hidden = self._forward(embeds, positions(self.mask)[:, -1:])

    def _forward(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        output = self.model(
            inputs_embeds=embeds,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]


@torch.no_grad()
def decode_text(
    model,
    ids: torch.Tensor,
    mask: torch.Tensor,
    seeds: list[int],
    *,
    max_tokens: int,
    eos: int,
    temperature: float = 1.0,
    embeds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample a continuation of each left-padded row; `embeds` `(B, L, D)` stand in for those of `ids` where images were put in.

    Returns `tokens` `(B, T)`, EOS after a row has ended, and its boolean mask, true up to and including the first EOS.
    """
    uniforms = row_uniforms(seeds, max_tokens, ids.device)
    embed = model.get_input_embeddings()
    decoder = Decoder(model.model.language_model, embed(ids) if embeds is None else embeds, mask)
    tokens, alive = [], torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    live = []
    for t in range(max_tokens):
        token = sample_tokens(model.lm_head(decoder.hidden), uniforms[:, t], temperature)
        token = torch.where(alive, token, eos)
        tokens.append(token)
        live.append(alive)
        alive = alive & (token != eos)
        if not alive.any() or t == max_tokens - 1:
            break
        decoder.step(embed(token).unsqueeze(1))
    return torch.stack(tokens, dim=1), torch.stack(live, dim=1)


@torch.no_grad()
def decode_image(
    model,
    ids: torch.Tensor,
    mask: torch.Tensor,
    seeds: list[int],
    *,
    special: dict[str, int],
    guidance_scale: float,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample the image tokens that follow rows ending in the begin-of-image token.

    Guided logits are `u + guidance_scale * (c - u)`; rows are `[all conditional; all unconditional]`, an unconditional row being
    its own prompt with every id but BOS and begin-of-image replaced by the pad token, its attention mask unchanged.

    Returns image tokens `(B, N)` and the log-probs of the distribution they were drawn from `(B, N)`.
    """
    count = model.config.vision_config.num_image_tokens
    uniforms = row_uniforms(seeds, count, ids.device)
    rows, row_mask = ids, mask
    if guidance_scale != 1:
        rows, row_mask = torch.cat([ids, unconditional(ids, special)]), torch.cat([mask, mask])
    decoder = Decoder(model.model.language_model, model.get_input_embeddings()(rows), row_mask)
    tokens, logprobs = [], []
    for t in range(count):
        logits = guided(model.model.generation_head(decoder.hidden).float(), guidance_scale)
        token = sample_tokens(logits, uniforms[:, t], temperature)
        tokens.append(token)
        logprobs.append((logits / (temperature or 1.0)).log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1))
        if t < count - 1:
            embeds = model.prepare_embeddings_for_image_generation(token.unsqueeze(1))
            decoder.step(embeds if guidance_scale == 1 else torch.cat([embeds, embeds]))
    return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1)


def unconditional(ids: torch.Tensor, special: dict[str, int]) -> torch.Tensor:
    """The prompt with everything but BOS and begin-of-image replaced by the pad token (as transformers' own generate)."""
    keep = (ids == special["bos"]) | (ids == special["boi"])
    return torch.where(keep, ids, special["pad"])


def guided(logits: torch.Tensor, guidance_scale: float, detach_uncond: bool = False) -> torch.Tensor:
    """Classifier-free guidance on rows `[conditional; unconditional]`: `u + w (c - u)`; `w = 1` has conditional rows only."""
    if guidance_scale == 1:
        return logits
    conditional, uncond = logits.chunk(2)
    uncond = uncond.detach() if detach_uncond else uncond
    return uncond + guidance_scale * (conditional - uncond)
