"""T2I-R1's outcome reward model: a LLaVA-OneVision that says whether an image matches."""

import numpy as np
import torch
import torch.nn.functional as F

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.loading import load_config, load_model, load_part
from t2i_rl.core.numbers import Count, Device, Dtype
from t2i_rl.core.readers import Reader, Reading, ReadsTexts
from t2i_rl.core.tokenizing import check_tokenizer, ids_of, marked, special_texts
from t2i_rl.rewards.boxes import COMPATS
from t2i_rl.rewards.yes_no import single_token, yes_share

RELEASED_TEMPERATURE = 0.3


class ORM(Reward, ReadsTexts):
    """P(yes) / (P(yes) + P(no)) of the first token of the answer (T2I-R1 section 3.4).

    LLaVA-OneVision is of arXiv 2408.03326.

    Args:
        path: a checkpoint of transformers' LlavaOnevisionForConditionalGeneration.
        question: with `{prompt}` where the raw prompt goes; it must be the one that the checkpoint
            was tuned on.
        template: the conversation around it, with `{image}` and `{question}`.
        yes_word, no_word: the answers that are read, each one token; lower case, as T2I-R1's scorer
            reads them.
        compat: `paper` takes the full softmax; `released` takes T2I-R1's, sharpened by its sampling
            temperature of 0.3. The released scorer also samples its answer and scores 0 when that
            is neither word; this is its value whenever it is one of them.

    Raises:
        UserError: an unknown `compat`; wording without its places; a checkpoint that cannot be
            loaded, or whose tokenizer does not fit it.
    """

    def __init__(
        self,
        path: str,
        question: str,
        template: str,
        compat: str = "paper",
        yes_word: str = "yes",
        no_word: str = "no",
        batch_size: Count = 4,
        dtype: Dtype = "bfloat16",
        device: Device | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, LlavaOnevisionForConditionalGeneration

        if compat not in COMPATS:
            raise UserError(f"reward.compat must be one of {', '.join(COMPATS)}, not {compat!r}")
        if "{prompt}" not in question or "{image}" not in template or "{question}" not in template:
            raise UserError("reward.question needs {prompt}, and reward.template needs {image} and {question}")
        self.question, self.template, self.batch_size = question, template, batch_size
        self.temperature = RELEASED_TEMPERATURE if compat == "released" else 1.0
        config = load_config(path, "llava_onevision", revision).text_config
        self.tokenizer, self.longest = load_part(AutoTokenizer, path, revision), config.max_position_embeddings
        check_tokenizer(self.tokenizer, path, rows=config.vocab_size)
        self.special = special_texts(self.tokenizer)
        self.reader = Reader("ORM", path, [Reading("LLaVA-OneVision", self.tokenizer, self.longest, conversation=True)])
        self.model = load_model(
            LlavaOnevisionForConditionalGeneration,
            path,
            kind="llava_onevision",
            dtype=dtype,
            device=device,
            revision=revision,
        )
        self.image_processor = load_part(AutoImageProcessor, path, revision)
        self.answers = [single_token(self.tokenizer, word, path) for word in (yes_word, no_word)]

    def __call__(self, drawn: Drawn) -> RewardOutput:
        self.reader.check(prompt.text for prompt in drawn.prompts)
        questions = [self.question.format(prompt=marked(prompt.text, self.special)) for prompt in drawn.prompts]
        parts = [slice(first, first + self.batch_size) for first in range(0, len(questions), self.batch_size)]
        return RewardOutput(torch.cat([self.ask(drawn.images[part], questions[part]) for part in parts]))

    @torch.no_grad()
    def ask(self, images: np.ndarray, questions: list[str]) -> torch.Tensor:
        """Share of yes `(B,)`, float64, for a question to each of `images` uint8 `(B, H, W, 3)`.

        Raises:
            UserError: a question with its image is longer than the model's positions.
        """
        device, dtype = self.model.device, self.model.dtype
        inputs = self.image_processor(images=list(images), return_tensors="pt").to(device)
        pixel_values, image_sizes = inputs["pixel_values"].to(dtype), inputs["image_sizes"]
        features = self.model.get_image_features(pixel_values, image_sizes, return_dict=True).pooler_output
        embed, rows = self.model.get_input_embeddings(), []
        for question, image in zip(questions, features, strict=True):
            texts = self.template.format(image="\0", question=question).split("\0")
            ids = [torch.tensor(ids_of(self.tokenizer, text), dtype=torch.long, device=device) for text in texts]
            before, after = map(embed, ids)
            rows.append(torch.cat([before, image.to(dtype), after]))
        width = max(map(len, rows))
        if width > self.longest:
            raise UserError(
                f"ORM: a question with its picture is {width} tokens, and the model has {self.longest} positions: "
                "shorten the prompt"
            )
        embeds = torch.stack([F.pad(row, (0, 0, width - len(row), 0)) for row in rows])
        mask = torch.stack([torch.arange(width, device=device) >= width - len(row) for row in rows]).long()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self.model(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, logits_to_keep=1)
        return yes_share(output.logits[:, -1], *self.answers, self.temperature)
