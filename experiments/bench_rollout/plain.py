"""The baselines: transformers' own image generation, and the plain loop that Janus's script and T2I-R1 are built on,
written anew.

The plain loop feeds one token at a time to the language model with its growing cache, the batch doubled for guidance, a
chunk of images at a time.
It has no other fault: padding is masked, positions count real tokens, sampling is over the whole softmax.
"""

import torch
from transformers import DynamicCache

from t2i_rl.models.autoregressive.engine.rows import positions, unconditional


@torch.no_grad()
def plain_images(model, ids, mask, special, guidance_scale: float, chunk: int) -> torch.Tensor:
    """Image tokens `(B, N)`."""
    return torch.cat(
        [
            _plain_chunk(model, ids[first : first + chunk], mask[first : first + chunk], special, guidance_scale)
            for first in range(0, len(ids), chunk)
        ]
    )


def _plain_chunk(model, ids, mask, special, guidance_scale: float) -> torch.Tensor:
    rows = torch.cat([ids, unconditional(ids, special)])
    mask, cache = torch.cat([mask, mask]), DynamicCache()
    embeds, place, tokens = model.get_input_embeddings()(rows), positions(mask), []
    count = model.config.vision_config.num_image_tokens
    for step in range(count):
        output = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        )
        conditional, uncond = model.model.generation_head(output.last_hidden_state[:, -1]).chunk(2)
        probabilities = (uncond + guidance_scale * (conditional - uncond)).float().softmax(-1)
        token = torch.multinomial(probabilities, 1)
        tokens.append(token)
        if step < count - 1:
            embeds = model.prepare_embeddings_for_image_generation(torch.cat([token, token]))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            place = positions(mask)[:, -1:]
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def plain_text(model, ids, mask, max_tokens: int, chunk: int) -> torch.Tensor:
    """Text tokens `(B, T)`, without stopping early (random weights never end a plan)."""
    parts = [slice(first, first + chunk) for first in range(0, len(ids), chunk)]
    return torch.cat([_plain_text_chunk(model, ids[part], mask[part], max_tokens) for part in parts])


def _plain_text_chunk(model, ids, mask, max_tokens: int) -> torch.Tensor:
    cache, tokens = DynamicCache(), []
    embeds, place = model.get_input_embeddings()(ids), positions(mask)
    for _ in range(max_tokens):
        output = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        )
        probabilities = model.lm_head(output.last_hidden_state[:, -1]).float().softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1))
        embeds = model.get_input_embeddings()(tokens[-1])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        place = positions(mask)[:, -1:]
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def transformers_images(model, ids, mask, guidance_scale: float) -> torch.Tensor:
    """`generate(generation_mode="image")` over the whole codebook, all rows at once."""
    return model.generate(
        inputs=ids, attention_mask=mask, generation_mode="image", do_sample=True, top_k=0, guidance_scale=guidance_scale
    )
