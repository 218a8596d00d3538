"""GIT as a reward: does it say yes to each object with its attributes (T2I-R1's VQA reward)."""

import numpy as np
import torch

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.loading import load_config, load_model, load_part, load_tokenizer
from t2i_rl.core.numbers import Count, Device, Dtype
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.readers import Reader, Reading, ReadsTexts
from t2i_rl.rewards.boxes import task_kind
from t2i_rl.rewards.yes_no import single_token, yes_share

SILENT = ("spatial", "numeracy")  # kinds of prompt that it says nothing about


class GitVQA(Reward, ReadsTexts):
    """Mean over phrases of P(yes) / (P(yes) + P(no)) after "<phrase>?" (T2I-R1 section 3.4).

    GIT is of arXiv 2205.14100. Phrases are the prompt's `attr_nouns`, else its `nouns`; a prompt
    without either scores 1, spatial and counting prompts score 0, which cancels within a group.

    Args:
        path: a checkpoint of transformers' GitForCausalLM tuned on VQA.

    Raises:
        UserError: a checkpoint that cannot be loaded, or whose tokenizer does not fit it or has no
            token for yes and no.
    """

    needs_meta = ("nouns",)

    def __init__(
        self,
        path: str,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: Device | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoImageProcessor, GitForCausalLM

        config = load_config(path, "git", revision)
        self.tokenizer = load_tokenizer(path, revision, rows=config.vocab_size, needs=("cls", "pad"))
        self.reader = Reader("GitVQA", path, [Reading("GIT", self.tokenizer)])
        self.longest = config.max_position_embeddings
        self.model = load_model(GitForCausalLM, path, kind="git", dtype=dtype, device=device, revision=revision)
        self.image_processor = load_part(AutoImageProcessor, path, revision)
        self.batch_size = batch_size
        self.answers = [single_token(self.tokenizer, word, path) for word in ("yes", "no")]

    def texts_of(self, prompt: Prompt) -> list[str]:
        """The questions that are asked about its image."""
        return [f"{phrase}?" for phrase in phrases_of(prompt.meta)]

    def refuses(self, prompt: Prompt) -> str | None:
        """A question that is longer than the model reads."""
        longest = max((len(self.ids_of(question)) for question in self.texts_of(prompt)), default=0)
        return f"its question is {longest} tokens, the model reads {self.longest}" if longest > self.longest else None

    def __call__(self, drawn: Drawn) -> RewardOutput:
        questions = [(row, text) for row, prompt in enumerate(drawn.prompts) for text in self.texts_of(prompt)]
        shares: list[list[float]] = [[] for _ in drawn.prompts]
        for first in range(0, len(questions), self.batch_size):
            part = questions[first : first + self.batch_size]
            answers = self.ask(drawn.images[[row for row, _ in part]], [text for _, text in part])
            for (row, _), share in zip(part, answers.tolist(), strict=True):
                shares[row].append(share)
        unasked = [0.0 if is_silent(prompt.meta) else 1.0 for prompt in drawn.prompts]
        scores = [sum(row) / len(row) if row else score for row, score in zip(shares, unasked, strict=True)]
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))

    @torch.no_grad()
    def ask(self, images: np.ndarray, questions: list[str]) -> torch.Tensor:
        """Share of yes `(B,)`, float64, for a question to each of `images` uint8 `(B, H, W, 3)`."""
        self.reader.check(questions)
        rows = [self.ids_of(question) for question in questions]
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        logits = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels.to(self.model.dtype)).logits
        last = torch.tensor([len(row) - width - 1 for row in rows], device=logits.device) + logits.shape[1]
        return yes_share(logits[torch.arange(len(rows), device=logits.device), last], *self.answers)

    def ids_of(self, question: str) -> list[int]:
        """The tokens of a question: the begin token, then those of its text."""
        return [self.tokenizer.cls_token_id, *self.tokenizer(question, add_special_tokens=False).input_ids]


def is_silent(meta: dict) -> bool:
    """Whether the prompt is of a kind that GIT is not asked about."""
    return task_kind(meta) in SILENT


def phrases_of(meta: dict) -> list[str]:
    """What GIT is asked for."""
    return [] if is_silent(meta) else list(meta.get("attr_nouns") or meta["nouns"])
