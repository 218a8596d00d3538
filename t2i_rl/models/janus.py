"""Janus and Janus-Pro: loading, the two conversations (plan, then image), and pictures out of tokens."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from t2i_rl.errors import UserError
from t2i_rl.rollout.decode import decode_image, decode_text


@dataclass(frozen=True)
class Chat:
    """The wording around a prompt. `{prompt}` in `instruction` is where the raw prompt goes (T2I-R1 section 3.2)."""

    system: str
    instruction: str

    def plan(self, prompt: str) -> str:
        """Phase 1: ask for a semantic plan."""
        system = f"{self.system.strip()}\n\n" if self.system else ""
        return f"{system}<|User|>: {self.instruction.format(prompt=prompt.strip()).strip()}\n\n<|Assistant|>:"

    def image(self, prompt: str, plan: str = "") -> str:
        """Phase 2, a fresh conversation: the raw prompt, then its plan if there is one."""
        content = f"{prompt.strip().rstrip('.')}. {plan}".strip() if plan else prompt.strip()
        return f"<|User|>: {content}\n\n<|Assistant|>:"


@dataclass
class Generation:
    """Images uint8 `(B, H, W, 3)` with the tokens and texts they came from; `plans` is empty strings without a plan."""

    images: np.ndarray
    plans: list[str]
    plan_lengths: list[int]
    image_ids: torch.Tensor


class Janus(nn.Module):
    """Adapter over `transformers.JanusForConditionalGeneration`; knows the chat format, not the training method."""

    family = "autoregressive"

    def __init__(
        self,
        path: str,
        chat: dict,
        dtype: str = "float32",
        revision: str | None = None,
        attn_implementation: str = "sdpa",
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        max_plan_tokens: int = 128,
    ):
        super().__init__()
        self.path, self.revision = str(path), revision
        self.model, self.tokenizer = load_pretrained(
            path, dtype=dtype, revision=revision, attn_implementation=attn_implementation
        )
        self.model.eval()
        self.chat = Chat(chat["system"], chat["instruction"])
        self.guidance_scale, self.temperature, self.max_plan_tokens = guidance_scale, temperature, max_plan_tokens
        self.special = special_ids(self.tokenizer)

    @staticmethod
    def image_size(settings: dict) -> int:
        """The side in pixels of what a config's checkpoint draws; reads its config.json, no weights.

        Raises:
            UserError: see `load_config`.
        """
        config = load_config(settings["path"], settings["revision"])
        tokens = math.isqrt(config.vision_config.num_image_tokens)
        return tokens * 2 ** (len(config.vq_config.channel_multiplier) - 1)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def sampling(self) -> dict:
        """The settings that a drawn image depends on besides weights, prompt and seed."""
        return {
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "max_plan_tokens": self.max_plan_tokens,
            "system": self.chat.system,
            "instruction": self.chat.instruction,
        }

    def encode(self, texts: list[str], boi: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask `(B, L)`, left-padded, one BOS each; with `boi` the begin-of-image token is appended."""
        rows = [self.tokenizer(text).input_ids + [self.special["boi"]] * boi for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[self.special["pad"]] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def draw_plans(self, prompts: list[str], seeds: list[int]) -> tuple[tuple, tuple, list[str]]:
        """Phase 1: `(ids, mask)` of the conversations, `(tokens, mask)` of the plans, and the plans as text."""
        ids, mask = self.encode([self.chat.plan(prompt) for prompt in prompts])
        tokens, token_mask = decode_text(
            self.model,
            ids,
            mask,
            seeds,
            max_tokens=self.max_plan_tokens,
            eos=self.special["eos"],
            temperature=self.temperature,
        )
        return (
            (ids, mask),
            (tokens, token_mask),
            [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)],
        )

    def draw_images(
        self, prompts: list[str], plans: list[str], seeds: list[int]
    ) -> tuple[tuple, torch.Tensor, torch.Tensor]:
        """Phase 2: `(ids, mask)` of the conversations, image tokens `(B, N)`, and the log-probs they were drawn with."""
        ids, mask = self.encode(
            [self.chat.image(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)], boi=True
        )
        tokens, logprobs = decode_image(
            self.model,
            ids,
            mask,
            seeds,
            special=self.special,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
        )
        return (ids, mask), tokens, logprobs

    def generate(self, prompts: list[str], seeds: list[int], mode: str = "plan") -> Generation:
        """Draw one image a prompt; `mode` is `plan` (write a plan, draw from it) or `direct`. Row `i` depends on `seeds[i]` alone."""
        plans, lengths = [""] * len(prompts), [0] * len(prompts)
        if mode == "plan":
            _, (_, token_mask), plans = self.draw_plans(prompts, seeds)
            lengths = token_mask.sum(-1).tolist()
        elif mode != "direct":
            raise UserError(f"an autoregressive model draws in mode plan or direct, not {mode!r}")
        _, tokens, _ = self.draw_images(prompts, plans, [seed + 1 for seed in seeds])
        return Generation(self.decode(tokens), plans, lengths, tokens)

    @torch.no_grad()
    def decode(self, image_ids: torch.Tensor) -> np.ndarray:
        """Image tokens `(B, N)` -> uint8 `(B, H, W, 3)`."""
        pixels = self.model.decode_image_tokens(image_ids).float()
        return ((pixels + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).cpu().numpy()


def special_ids(tokenizer) -> dict[str, int]:
    """Ids of the tokens that the chat format stands on.

    Raises:
        UserError: a tag is not one token of this tokenizer (Janus-Pro needs `<|User|>` and `<|Assistant|>` as single ids).
    """
    names = {
        "boi": "<begin_of_image>",
        "eoi": "<end_of_image>",
        "image": "<image_placeholder>",
        "user": "<|User|>",
        "assistant": "<|Assistant|>",
    }
    found = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, text in names.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(f"the tokenizer has no single token for {text!r}: this is not a Janus-Pro tokenizer")
        found[name] = ids[0]
    if None in found.values():
        raise UserError(
            f"the tokenizer lacks {[name for name, value in found.items() if value is None]}: this is not a Janus-Pro tokenizer"
        )
    return found


def load_config(path: str, revision: str | None):
    """The config of a Janus checkpoint, from a folder or a hub id.

    Raises:
        UserError: it can be neither found nor downloaded, or is not Janus's; the line names what to do.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load(path, error)) from error
    if config.model_type != "janus":
        raise UserError(f"{path} holds a {config.model_type!r} model, not a janus one")
    return config


def _cannot_load(path: str, error: Exception) -> str:
    fix = (
        "check that the folder is whole"
        if Path(path).is_dir()
        else f"download it where there is a network (hf download {path}), or give model.path=<folder>"
    )
    return f"cannot load {path}: {str(error).strip().splitlines()[0]} -- {fix}"


def load_pretrained(path: str, *, dtype: str, revision: str | None, attn_implementation: str):
    """Model and tokenizer from a folder or a hub id.

    Raises:
        UserError: the weights can be neither found nor downloaded, or are not Janus's; the line names what to do.
    """
    from transformers import AutoTokenizer, JanusForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load_config(path, revision)
    try:
        model, info = JanusForConditionalGeneration.from_pretrained(
            path,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(_cannot_load(path, error)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(
            f"cannot load {path}: a weight file is truncated or broken ({error}); fetch it again"
        ) from error
    if info["missing_keys"]:
        raise UserError(
            f"{path} lacks {len(info['missing_keys'])} weights, first {sorted(info['missing_keys'])[0]}; the checkpoint is not whole"
        )
    return model, tokenizer
