"""The text encoders of a pipeline: what they give, which it has, and whether their tokenizers fit them."""

from dataclasses import dataclass, fields

import torch

from t2i_rl.core import loading
from t2i_rl.core.tokenizing import check_pooling, check_window

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
FRAMES = {"clip_text_model": {"begin": "bos", "end": "eos"}, "t5": {"end": "eos"}, "gemma2": {"begin": "bos"}}


@dataclass(frozen=True)
class TextEncoding:
    """What the denoiser reads of `B` prompts: `embeds` `(B, N, D)` and, for SDXL and SD3, `pooled` `(B, P)`."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows) -> "TextEncoding":
        return self.map(lambda part: part[rows])

    def map(self, change) -> "TextEncoding":
        """`change` of every tensor."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return TextEncoding(**{name: None if part is None else change(part) for name, part in parts.items()})


def tokenizers_of(path: str, revision: str | None, index: dict) -> dict:
    """The tokenizers that a pipeline's index names, each checked against the config of its text encoder.

    Raises:
        UserError: one cannot be loaded, or does not fit its encoder.
    """
    import transformers

    tokenizers = {}
    for encoder in TEXT_ENCODERS:
        name = encoder.replace("text_encoder", "tokenizer")
        if (index.get(encoder) or [None])[0] is None or (index.get(name) or [None])[0] is None:
            continue
        kind = getattr(transformers, index[encoder][1]).config_class
        try:
            config = kind.from_pretrained(path, subfolder=encoder, revision=revision)
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
