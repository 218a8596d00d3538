"""The text encoders of a pipeline: what they give, and whether their tokenizers fit them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from t2i_rl.core import loading
from t2i_rl.core.tokenizing import check_pooling, check_window

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
FRAMES = {"clip_text_model": {"begin": "bos", "end": "eos"}, "t5": {"end": "eos"}, "gemma2": {"begin": "bos"}}


@dataclass(frozen=True)
class TextEncoding:
    """What the denoiser reads of `B` prompts.

    embeds: `(B, N, D)`. pooled: `(B, P)`, for SDXL, SD3 and FLUX; SANA's mask `(B, N)`.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Any) -> "TextEncoding":
        return self.map(lambda part: part[rows])

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TextEncoding":
        """`change` of every tensor."""
        return TextEncoding(change(self.embeds), None if self.pooled is None else change(self.pooled))


def tokenizers_of(path: str, revision: str | None, index: dict) -> dict:
    """The tokenizers that a pipeline's index names, each checked against its encoder.

    Raises:
        UserError: one cannot be loaded, or does not fit its encoder.
    """
    import transformers

    tokenizers = {}
    for encoder in TEXT_ENCODERS:
        name = encoder.replace("text_encoder", "tokenizer")
        if (index.get(encoder) or [None])[0] is None or (index.get(name) or [None])[0] is None:
            continue
        config_class = getattr(transformers, index[encoder][1]).config_class
        try:
            config = config_class.from_pretrained(path, subfolder=encoder, revision=revision)
        except (OSError, ValueError) as error:
            raise loading.cannot_load(path, error) from error
        tokenizers[name] = loading.load_tokenizer(
            path,
            revision,
            kind=getattr(transformers, index[name][1]),
            subfolder=name,
            rows=config.vocab_size,
            needs=("pad",),
            **FRAMES.get(config.model_type, {}),
        )
        if config.model_type == "clip_text_model":
            check_pooling(tokenizers[name], f"{path}/{name}", config)
            check_window(tokenizers[name], f"{path}/{name}", config)
    return tokenizers
