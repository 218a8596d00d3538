"""ImageReward: which image of a text people would rank higher, by a BLIP and a small head."""

import re

import numpy as np
import torch
from torch import nn

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.loading import DTYPES, first_line, load_part, reads_as_text
from t2i_rl.core.numbers import Count, Device, Dtype
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.ranks import own_gpu
from t2i_rl.core.readers import Reader, Reading, ReadsTexts
from t2i_rl.core.tokenizing import check_tokenizer
from t2i_rl.rewards.open_clip import read_state
from t2i_rl.rewards.pixels import prepared

MEAN, STD = 0.16717179, 1.0333394  # of the raw score over the training set, as released
LONGEST = 35  # tokens of a text, as released
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm1\.", ".layer_norm1."),
    (r"\.norm2\.", ".layer_norm2."),
)


class ImageReward(Reward, ReadsTexts):
    """Score of an image and its raw prompt, standardised as released (arXiv 2304.05977).

    It is about -2 to 2; tables often show it times 100.

    Args:
        path: a folder or hub id with `file`, the published `ImageReward.pt`, read as plain tensors:
            nothing in it is executed.
        tokenizer: BERT's, a folder or hub id.
        text_heads, vision_heads: attention heads, which the file does not tell.

    Raises:
        UserError: a checkpoint that cannot be loaded, or a tokenizer that does not fit it.
    """

    differentiable = True

    def __init__(
        self,
        path: str,
        file: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        text_heads: Count = 12,
        vision_heads: Count = 16,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: Device | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoTokenizer, CLIPImageProcessor

        if dtype not in DTYPES:
            raise UserError(f"reward.dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self.batch_size = batch_size
        self.tokenizer = reads_as_text(load_part(AutoTokenizer, tokenizer))
        state = read_state(path, file, revision)
        try:
            self.vision, self.text, self.head = build(state, text_heads, vision_heads)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}/{file} is no ImageReward: {first_line(error)}") from error
        rows = len(self.text.get_input_embeddings().weight)
        check_tokenizer(self.tokenizer, tokenizer, rows=rows, begin="cls", end="sep", needs=("pad",))
        self.reader = Reader("ImageReward", path, [Reading("BERT", self.tokenizer, LONGEST)])
        device = own_gpu() if device == "auto" else device
        for part in (self.vision, self.text, self.head):
            part.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
        side = self.vision.config.image_size
        crop = {"height": side, "width": side}
        self.image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop)

    def __call__(self, drawn: Drawn) -> RewardOutput:
        texts = [prompt.text for prompt in drawn.prompts]
        parts = [slice(first, first + self.batch_size) for first in range(0, len(texts), self.batch_size)]
        return RewardOutput(torch.cat([self.score(drawn.images[part], texts[part]) for part in parts]))

    @torch.no_grad()
    def score(self, images: np.ndarray, texts: list[str]) -> torch.Tensor:
        """Standardised scores `(B,)`, float64, of images uint8 `(B, H, W, 3)` under their texts."""
        pixel_values = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return self._scored(pixel_values, texts).cpu()

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """The same `(B,)`, float32, with gradients to float32 pixels `(B, 3, H, W)` in [0, 1]."""
        pixel_values = prepared(pixels.to(self.vision.device), self.image_processor)
        return self._scored(pixel_values, [prompt.text for prompt in prompts]).float()

    def _scored(self, pixel_values: torch.Tensor, texts: list[str]) -> torch.Tensor:
        self.reader.check(texts)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        tokens = tokens.to(self.vision.device)
        image_states = self.vision(pixel_values.to(self.vision.device, self.vision.dtype)).last_hidden_state
        output = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image_states)
        return (self.head(output.last_hidden_state[:, 0]).squeeze(-1).double() - MEAN) / STD


def build(state: dict[str, torch.Tensor], text_heads: int, vision_heads: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Vision encoder, text encoder and head with the released weights, off which sizes are read."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision_state = {_renamed(name): value for name, value in _under(state, "blip.visual_encoder.").items()}
    text_state, head_state = _under(state, "blip.text_encoder."), _under(state, "mlp.layers.")
    text_state.pop("embeddings.position_ids", None)
    patches = vision_state["embeddings.patch_embedding.weight"]
    patches_of_image = vision_state["embeddings.position_embedding"].shape[1] - 1
    vision_config = BlipVisionConfig(
        hidden_size=len(patches),
        intermediate_size=len(vision_state["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(vision_state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=vision_heads,
        image_size=round(patches_of_image**0.5) * patches.shape[-1],
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,
    )
    words = text_state["embeddings.word_embeddings.weight"]
    text_config = BlipTextConfig(
        vocab_size=len(words),
        hidden_size=words.shape[1],
        encoder_hidden_size=len(patches),
        intermediate_size=len(text_state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(text_state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=text_heads,
        max_position_embeddings=len(text_state["embeddings.position_embeddings.weight"]),
    )
    vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    # as released: linear layers with dropout between some of them, and nothing else
    shapes = {int(name.split(".")[0]): value.shape for name, value in head_state.items() if name.endswith("weight")}
    layers = [nn.Linear(*shapes[i][::-1]) if i in shapes else nn.Identity() for i in range(max(shapes) + 1)]
    head = nn.Sequential(*layers)
    for part, part_state in ((vision, vision_state), (text, text_state), (head, head_state)):
        part.load_state_dict(part_state)
    return vision, text, head


def _under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not part:
        raise KeyError(f"no weights under {prefix}")
    return part


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _layers(state: dict[str, torch.Tensor], pattern: str) -> int:
    """How many layers there are weights of, by a pattern that has a layer's number in its group."""
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))
