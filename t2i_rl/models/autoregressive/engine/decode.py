"""Sampling: plans from the language head, images from the generation head under guidance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from t2i_rl.core.finite import check_finite
from t2i_rl.core.seeding import row_uniforms
from t2i_rl.models.autoregressive.engine.emit import ImageEmitter, TextEmitter
from t2i_rl.models.autoregressive.engine.engine import Engine
from t2i_rl.models.autoregressive.engine.memory import even_chunks, rows_that_fit
from t2i_rl.models.autoregressive.engine.rows import unconditional

# where steps are recorded, prefixes are padded to a multiple, so that a recording serves many
# batches
PREFIX_STEP = 32
BROKEN = (
    "the weights are broken, or a half precision overflows (take model.rollout.dtype=bfloat16 or float32, and "
    "model.dtype likewise)"
)
WORKING_BYTES = 48  # a vocabulary entry's logits, probabilities and cumulative sums while one token is sampled


@dataclass
class DecodedImages:
    """Image tokens `(B, N)`, and what was seen of their distributions, float32 `(B, N)`.

    logprobs: of the distribution that they were drawn from. The self-certainties are of the
    conditional and of the guided distribution.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    conditional_self_certainty: torch.Tensor
    guided_self_certainty: torch.Tensor


@torch.no_grad()
def decode_text(
    engine: Engine,
    ids: torch.Tensor,
    mask: torch.Tensor,
    seeds: list[int],
    *,
    max_tokens: int,
    eos: int,
    temperature: float = 1.0,
    embeds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `len(seeds) / len(ids)` continuations of each row, those of a row adjacent.

    Args:
        ids, mask: left-padded rows `(P, L)`.
        embeds: `(P, L, D)`, in place of those of `ids`, where images were put in.

    Returns `tokens` `(B, T)`, EOS after a row has ended, and its boolean mask, true up to and
    including the first EOS.

    Raises:
        UserError: not even one row fits into the free memory, or logits are not finite.
    """
    group_size = len(seeds) // len(ids)
    prefix = prefix_length(engine, ids)
    uniforms = row_uniforms(seeds, max_tokens, ids.device)
    cache_bytes = engine.cache_bytes(max_tokens) + engine.cache_bytes(prefix) // group_size
    max_rows = engine.options.max_rows or rows_that_fit(
        cache_bytes + WORKING_BYTES * len(engine.weights.text_head),
        engine.device,
        "writing a plan",
        reusable=engine.held_bytes(TextEmitter),
    )
    tokens, lengths = [], []
    for part in even_chunks(len(ids), max(1, max_rows // group_size)):
        rows = slice(part.start * group_size, part.stop * group_size)
        shape = (rows.stop - rows.start, group_size, prefix, max_tokens)
        session = engine.session(TextEmitter, *shape, eos=eos, temperature=temperature)
        session.prefill(ids[part], mask[part], None if embeds is None else embeds[part])
        session.emitter.start(uniforms[rows])
        count = session.decode(session.emitter.ended)
        finite = torch.where(session.emitter.finite, 0.0, torch.nan)
        check_finite(finite, "the logits of the text that the model wrote", BROKEN)
        session.emitter.tokens[:, count:] = eos
        tokens.append(session.emitter.tokens.clone())
        lengths.append(session.emitter.lengths.clone())
    tokens, lengths = torch.cat(tokens), torch.cat(lengths)
    longest = int(lengths.max())
    return tokens[:, :longest], torch.arange(longest, device=ids.device) < lengths.unsqueeze(1)


@torch.no_grad()
def decode_image(
    engine: Engine,
    ids: torch.Tensor,
    mask: torch.Tensor,
    seeds: list[int],
    *,
    count: int,
    special: dict[str, int],
    guidance_scale: float,
    temperature: float = 1.0,
) -> DecodedImages:
    """Sample the `count` image tokens that follow each of the rows `(B, L)`.

    A row ends in the begin-of-image token. Guided logits are `u + guidance_scale * (c - u)`; rows
    are `[all conditional; all unconditional]`. An unconditional row is its own prompt with every id
    but BOS and begin-of-image replaced by the pad token, and with the same attention mask.

    Raises:
        UserError: not even one row fits into the free memory, or logits are not finite.
    """
    branches = [(ids, mask)]
    if guidance_scale != 1:
        branches.append((unconditional(ids, special), mask))
    guidance = () if guidance_scale == 1 else (guidance_scale,)
    return decode_branches(engine, branches, seeds, count=count, guidance=guidance, temperature=temperature)


@torch.no_grad()
def decode_branches(
    engine: Engine,
    branches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    seeds: list[int],
    *,
    count: int,
    guidance: tuple[float, ...],
    temperature: float = 1.0,
) -> DecodedImages:
    """Sample `count` image tokens after each row of the first branch.

    They are guided by the same row of the other branches (see `rows.guided`). A branch is ids `(B,
    L)` or embeddings `(B, L, D)`, left-padded to the length that all share, with its mask `(B, L)`.

    Raises:
        UserError: not even one row fits into the free memory, or logits are not finite.
    """
    ids, embedded = branches[0][0], branches[0][0].ndim == 3
    prefix = prefix_length(engine, ids)
    uniforms = row_uniforms(seeds, count, ids.device)
    bytes_per_row = len(branches) * engine.cache_bytes(prefix + count) + WORKING_BYTES * len(engine.weights.image_embed)
    max_rows = engine.options.max_rows or rows_that_fit(
        bytes_per_row, engine.device, "drawing an image", reusable=engine.held_bytes(ImageEmitter)
    )
    parts = []
    for part in even_chunks(len(ids), max_rows):
        rows = torch.cat([branch_rows[part] for branch_rows, _ in branches])
        mask = torch.cat([branch_mask[part] for _, branch_mask in branches])
        session = engine.session(ImageEmitter, len(rows), 1, prefix, count, guidance=guidance, temperature=temperature)
        session.prefill(mask if embedded else rows, mask, rows if embedded else None)
        session.emitter.start(uniforms[part])
        session.decode()
        emitter = session.emitter
        check_finite(emitter.logprobs, "the logits of the image that the model drew", BROKEN)
        parts.append([t.clone() for t in (emitter.tokens, emitter.logprobs, emitter.conditional, emitter.guided)])
    return DecodedImages(*map(torch.cat, zip(*parts)))


def prefix_length(engine: Engine, ids: torch.Tensor) -> int:
    """Positions of the prefixes `(P, L)` in the cache: `L`, or more for recorded steps."""
    step = PREFIX_STEP if engine.options.graphs and engine.device.type == "cuda" else 1
    return -(-ids.shape[1] // step) * step
