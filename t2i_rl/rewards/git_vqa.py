"""GIT as a reward: does it answer yes when asked for each attributed object (T2I-R1's VQA reward)."""

import torch

from t2i_rl.loading import load_model, load_part
from t2i_rl.rewards.output import RewardOutput
from t2i_rl.rewards.yes_no import single_token, yes_share
from t2i_rl.rollout.buffer import Rollout

SILENT = ("spatial", "numeracy")  # kinds of prompt that it says nothing about


class GitVQA:
    """Mean over the phrases of P(yes) / (P(yes) + P(no)) after "<phrase>?" (T2I-R1 section 3.4; GIT: arXiv 2205.14100).

    Phrases are the prompt's `attr_nouns`, else its `nouns`; a prompt without either scores 1, spatial and counting prompts score 0,
    which cancels within a group.

    Args:
        path: a checkpoint of transformers' GitForCausalLM tuned on VQA.

    Raises:
        UserError: a checkpoint that cannot be loaded, or whose tokenizer has no token for yes and no.
    """

    needs_images = True
    needs_meta = ("nouns",)
    distribution = None

    def __init__(
        self,
        path: str,
        batch_size: int = 16,
        dtype: str = "float32",
        device: str | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, GitForCausalLM

        self.model = load_model(GitForCausalLM, path, kind="git", dtype=dtype, device=device, revision=revision)
        self.tokenizer = load_part(AutoTokenizer, path, revision)
        self.pictures = load_part(AutoImageProcessor, path, revision)
        self.batch_size = batch_size
        self.answers = [single_token(self.tokenizer, word, path) for word in ("yes", "no")]

    def __call__(self, rollout: Rollout) -> RewardOutput:
        asked = [(row, phrase) for row, prompt in enumerate(rollout.prompts) for phrase in phrases_of(prompt.meta)]
        shares: list[list[float]] = [[] for _ in rollout.prompts]
        for first in range(0, len(asked), self.batch_size):
            part = asked[first : first + self.batch_size]
            answers = self.ask(rollout.images[[row for row, _ in part]], [f"{phrase}?" for _, phrase in part])
            for (row, _), share in zip(part, answers.tolist(), strict=True):
                shares[row].append(share)
        scores = [
            sum(each) / len(each) if each else 0.0 if is_silent(prompt.meta) else 1.0
            for each, prompt in zip(shares, rollout.prompts, strict=True)
        ]
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))

    @torch.no_grad()
    def ask(self, images, questions: list[str]) -> torch.Tensor:
        """Share of yes `(B,)`, float64, for a question to each of `images` uint8 `(B, H, W, 3)`."""
        cls = self.tokenizer.cls_token_id
        rows = [[cls, *self.tokenizer(question, add_special_tokens=False).input_ids] for question in questions]
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        pixels = self.pictures(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        logits = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels.to(self.model.dtype)).logits
        last = torch.tensor([len(row) - width - 1 for row in rows], device=logits.device) + logits.shape[1]
        return yes_share(logits[torch.arange(len(rows), device=logits.device), last], *self.answers)


def is_silent(meta: dict) -> bool:
    """Whether the prompt is of a kind that GIT is not asked about."""
    kind = meta.get("task_type")
    return kind in SILENT if kind else bool(meta.get("numeracy_info") or meta.get("spatial_info"))


def phrases_of(meta: dict) -> list[str]:
    """What GIT is asked for."""
    return [] if is_silent(meta) else list(meta.get("attr_nouns") or meta["nouns"])
