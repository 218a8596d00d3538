"""How well an image fits its text by a CLIP: HPS v2.1, PickScore, or CLIP itself."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.loading import load_config, load_model, load_part, reads_as_text
from t2i_rl.core.numbers import Count, Device, Dtype
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.readers import Reader, Reading, ReadsTexts
from t2i_rl.core.tokenizing import check_pooling, check_tokenizer
from t2i_rl.rewards.open_clip import load_open_clip
from t2i_rl.rewards.pixels import prepared


class ClipScore(Reward, ReadsTexts):
    """Cosine of image and raw prompt, without CLIP's factor of 100 unless `scaled`.

    HPS v2.1 (arXiv 2306.09341; T2I-R1 section 3.4) lies about 0.2 to 0.35; PickScore (arXiv
    2305.01569) is published scaled, about 18 to 24.

    Args:
        path: a folder or hub id.
        file: a published open_clip file in it (`HPS_v2.1_compressed.pt`, read as plain tensors);
            None: `path` is a transformers CLIPModel.
        processor: where CLIP's tokenizer and image processor come from; None: from `path`.
        scaled: multiplied by the model's own `exp(logit_scale)`.
        text_heads, vision_heads: attention heads, which an open_clip file does not tell.

    Raises:
        UserError: a checkpoint that cannot be loaded, or whose tokenizer does not fit it.
    """

    differentiable = True

    def __init__(
        self,
        path: str,
        file: str | None = None,
        processor: str | None = None,
        scaled: bool = False,
        text_heads: Count = 16,
        vision_heads: Count = 16,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: Device | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if file and not processor:
            raise UserError("reward.file needs reward.processor: the folder of CLIP's tokenizer and image processor")
        self.batch_size, self.scaled = batch_size, scaled
        source, source_revision = (processor, None) if processor else (path, revision)
        self.tokenizer = reads_as_text(load_part(AutoTokenizer, source, source_revision))
        self.image_processor = load_part(AutoImageProcessor, source, source_revision)
        if file:
            layout = {"text_heads": text_heads, "vision_heads": vision_heads, "eos": self.tokenizer.eos_token_id}
            self.model = load_open_clip(path, file, dtype=dtype, device=device, revision=revision, **layout)
            self._check_tokenizer(source, self.model.config.text_config)
        else:
            self._check_tokenizer(source, load_config(path, "clip", revision).text_config)
            self.model = load_model(CLIPModel, path, kind="clip", dtype=dtype, device=device, revision=revision)
        self.model.requires_grad_(False)
        self.longest = self.model.config.text_config.max_position_embeddings
        self.reader = Reader("ClipScore", path, [Reading("CLIP", self.tokenizer, self.longest)])

    def _check_tokenizer(self, path: str, text_config: Any) -> None:
        check_tokenizer(self.tokenizer, path, rows=text_config.vocab_size, begin="bos", end="eos", needs=("pad",))
        check_pooling(self.tokenizer, path, text_config)

    def __call__(self, drawn: Drawn) -> RewardOutput:
        texts = [prompt.text for prompt in drawn.prompts]
        parts = [slice(first, first + self.batch_size) for first in range(0, len(texts), self.batch_size)]
        return RewardOutput(torch.cat([self.cosine(drawn.images[part], texts[part]) for part in parts]))

    @torch.no_grad()
    def cosine(self, images: np.ndarray, texts: list[str]) -> torch.Tensor:
        """Cosines (scaled, if asked) `(B,)`, float64, of images uint8 `(B, H, W, 3)` with texts."""
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return self._compared(pixels, texts).cpu()

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """The same `(B,)`, float32, with gradients to float32 pixels `(B, 3, H, W)` in [0, 1]."""
        pixel_values = prepared(pixels.to(self.model.device), self.image_processor)
        return self._compared(pixel_values, [prompt.text for prompt in prompts]).float()

    def _compared(self, pixel_values: torch.Tensor, texts: list[str]) -> torch.Tensor:
        self.reader.check(texts)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        output = self.model(pixel_values=pixel_values, **tokens.to(self.model.device), return_dict=True)
        cosine = F.cosine_similarity(output.image_embeds.double(), output.text_embeds.double(), dim=-1)
        return cosine * self.model.logit_scale.double().exp() if self.scaled else cosine
