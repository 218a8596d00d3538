"""Janus and Janus-Pro: loading, the conversations (plan, then image), and images out of tokens."""

import copy
import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from torch import nn

from t2i_rl.core import loading
from t2i_rl.core.contracts import Generation, ImageModel
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Device, Dtype, Guidance, Temperature, check_arguments
from t2i_rl.core.pixels import to_bytes
from t2i_rl.core.readers import Reader, Reading
from t2i_rl.core.tokenizing import check_tokenizer, ids_of, marked, special_texts
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.engine.decode import DecodedImages, decode_image, decode_text
from t2i_rl.models.autoregressive.engine.engine import Engine, EngineOptions
from t2i_rl.models.autoregressive.engine.score import score_image, score_text
from t2i_rl.models.autoregressive.engine.stats import TokenStats
from t2i_rl.models.autoregressive.interleaved import InterleavedJanus

TAGS = {
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
    "image": "<image_placeholder>",
    "user": "<|User|>",
    "assistant": "<|Assistant|>",
}


class Janus(ImageModel):
    """Adapter over `transformers.JanusForConditionalGeneration`.

    It knows the chat format, not the training method.

    Args:
        chat: see `Chat`.
        rollout: how drawing is computed.
    """

    family = "autoregressive"

    def __init__(
        self,
        path: str,
        chat: Mapping,
        dtype: Dtype = "float32",
        revision: str | None = None,
        attn_implementation: str = "sdpa",
        device: Device | None = None,
        guidance_scale: Guidance = 5.0,
        temperature: Temperature = 1.0,
        max_plan_tokens: Count = 128,
        rollout: EngineOptions | None = None,
    ):
        super().__init__()
        check_arguments(Janus, locals(), "model")
        self.chat, self.engine = Chat.of(chat), Engine(rollout)
        self.path, self.revision = str(path), revision
        self.model, self.tokenizer = load_pretrained(
            path, dtype=dtype, revision=revision, attn_implementation=attn_implementation, device=device
        )
        self.model.eval()
        self.guidance_scale, self.temperature, self.max_plan_tokens = guidance_scale, temperature, max_plan_tokens
        self.special = special_ids(self.tokenizer)
        self.special_texts = special_texts(self.tokenizer, *TAGS.values())
        self.reader = reader_of(self.tokenizer, self.model.config, self.chat, self.path)

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """See `ImageModel.check`; what draws fast has options of its own."""
        if settings.get("rollout"):
            instantiate(settings["rollout"])

    @classmethod
    def text_reader(cls, settings: Mapping[str, Any]) -> Reader:
        """How a config's checkpoint reads prompts; its tokenizer is read, no weights.

        Raises:
            UserError: see `load_tokenizer`.
        """
        path, revision = str(settings["path"]), settings["revision"]
        config = load_config(path, revision)
        return reader_of(load_tokenizer(path, revision, config), config, Chat.of(settings["chat"]), path)

    @classmethod
    def image_size(cls, settings: Mapping[str, Any]) -> int:
        """The side in pixels of what a config draws; reads its config.json, no weights.

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
        # Runs of before `final_stop` was a choice name none, and stripped it: their settings stay
        # equal to ours.
        stop = {"final_stop": "keep"} if self.chat.final_stop == "keep" else {}
        return {
            **stop,
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "max_plan_tokens": self.max_plan_tokens,
            "system": self.chat.system,
            "instruction": self.chat.instruction,
            "dtype": self.engine.options.dtype or str(self.model.dtype).removeprefix("torch."),
        }

    def prepare(self) -> None:
        """Read the weights as they are now for drawing.

        Under FSDP this gathers them: every rank calls it.
        """
        self.engine.load(self.model)

    def forward(
        self, plan: tuple | None = None, image: tuple | None = None, distribution: str = "conditional"
    ) -> TokenStats:
        """Teacher-forced statistics of plans, or of images under a distribution.

        Args:
            plan: `(ids, mask, tokens, token_mask)`.
            image: `(ids, mask, tokens)`.
            distribution: of the images, see `score_image`.
        """
        if plan is not None:
            return score_text(self.model, *plan, temperature=self.temperature)
        return score_image(
            self.model,
            *image,
            special=self.special,
            distribution=distribution,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
        )

    def interleaved(self) -> InterleavedJanus:
        """Texts and images in one conversation with this model: what method=irg asks of any."""
        return InterleavedJanus(self)

    def twin(self) -> "Janus":
        """A frozen copy for scoring; it cannot draw."""
        shared = {id(self.engine): None, id(self.tokenizer): self.tokenizer}
        return copy.deepcopy(self, shared).requires_grad_(False).eval()

    def blocks(self) -> list[nn.Module]:
        """The layers that FSDP gathers one at a time, and checkpointing computes again."""
        return list(self.model.model.language_model.layers)

    def unsharded(self) -> set[nn.Parameter]:
        """What FSDP leaves whole: the frozen parts around the language model.

        Drawing uses them between forward passes.
        """
        trunk = ("model.language_model.", "lm_head.")
        named = self.model.named_parameters()
        return {parameter for name, parameter in named if not (name.startswith(trunk) or parameter.requires_grad)}

    def encode(self, texts: list[str], boi: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask `(B, L)`, left-padded, one BOS each.

        With `boi` the begin-of-image token is appended. What a user or a model wrote is put into
        `texts` by way of `as_text`.
        """
        rows = [self.ids_of(text) + [self.special["boi"]] * boi for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[self.special["pad"]] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def ids_of(self, conversation: str) -> list[int]:
        """Token ids of a conversation, one BOS in front whatever the tokenizer's own settings
        say."""
        return [self.special["bos"], *ids_of(self.tokenizer, conversation)]

    def as_text(self, text: str) -> str:
        """A text for a conversation, where a special token that it spells is read as text."""
        return marked(text, self.special_texts)

    def _check_room(self, lengths: torch.Tensor) -> None:
        """Refuse conversations that are longer `(B,)` than the model has positions."""
        longest, room = int(lengths.max()), self.model.config.text_config.max_position_embeddings
        if longest > room:
            raise UserError(
                f"a conversation with what was drawn or is to be drawn has {longest} tokens, and the model has {room} "
                "positions: shorten the prompt, or lower model.max_plan_tokens"
            )

    def draw_plans(self, prompts: list[str], seeds: list[int]) -> tuple[tuple, tuple, list[str]]:
        """Phase 1: plans, a row for each seed.

        Returns `(ids, mask)` of the conversations, `(tokens, mask)` of the plans, and the plans as
        text.

        Draws with the weights that `prepare` read. Equal prompts that stand together are read once.
        """
        runs = [(prompt, len(list(group))) for prompt, group in groupby(prompts)]
        group_size = runs[0][1] if len({size for _, size in runs}) == 1 else 1
        self.reader.check(prompts)
        ids, mask = self.encode([self.chat.plan(self.as_text(prompt)) for prompt in prompts[::group_size]])
        tokens, token_mask = decode_text(
            self.engine,
            ids,
            mask,
            seeds,
            max_tokens=self.max_plan_tokens,
            eos=self.special["eos"],
            temperature=self.temperature,
        )
        self._check_room(mask.sum(dim=1).repeat_interleave(group_size) + token_mask.sum(dim=1))
        plans = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        ids, mask = ids.repeat_interleave(group_size, dim=0), mask.repeat_interleave(group_size, dim=0)
        return (ids, mask), (tokens, token_mask), plans

    def draw_images(self, prompts: list[str], plans: list[str], seeds: list[int]) -> tuple[tuple, DecodedImages]:
        """Phase 2: `(ids, mask)` of the conversations, and the images' tokens.

        Draws with the weights that `prepare` read.
        """
        self.reader.check(prompts)
        pairs = zip(map(self.as_text, prompts), map(self.as_text, plans), strict=True)
        ids, mask = self.encode([self.chat.image(prompt, plan) for prompt, plan in pairs], boi=True)
        self._check_room(mask.sum(dim=1) + self.model.config.vision_config.num_image_tokens)
        decoded = decode_image(
            self.engine,
            ids,
            mask,
            seeds,
            count=self.model.config.vision_config.num_image_tokens,
            special=self.special,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
        )
        return (ids, mask), decoded

    def generate(self, prompts: list[str], seeds: list[int], mode: str = "plan", fresh: bool = True) -> Generation:
        """Draw one image a prompt; row `i` depends on `seeds[i]` alone.

        `mode` is `plan` (write a plan, draw from it) or `direct`. `fresh=False` draws with the
        weights that `prepare` read last, which spares reading them again for every batch.
        """
        if fresh:
            self.prepare()
        plans, lengths = [""] * len(prompts), [0] * len(prompts)
        if mode == "plan":
            _, (_, token_mask), plans = self.draw_plans(prompts, seeds)
            lengths = token_mask.sum(-1).tolist()
        elif mode != "direct":
            raise UserError(f"an autoregressive model draws in mode plan or direct, not {mode!r}")
        _, decoded = self.draw_images(prompts, plans, [seed + 1 for seed in seeds])
        return Generation(self.decode(decoded.tokens), plans, lengths, decoded.tokens)

    @torch.no_grad()
    def decode(self, image_ids: torch.Tensor) -> np.ndarray:
        """Image tokens `(B, N)` -> uint8 `(B, H, W, 3)`.

        Raises:
            UserError: a pixel is not finite.
        """
        pixels = self.model.decode_image_tokens(image_ids).float()
        return to_bytes(pixels.permute(0, 3, 1, 2), centred=True)


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that the chat format stands on.

    Raises:
        UserError: a tag is not one token of this tokenizer (Janus-Pro needs `<|User|>` and
            `<|Assistant|>` as single ids).
    """
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, text in TAGS.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise UserError(f"the tokenizer has no single token for {text!r}: this is not a Janus-Pro tokenizer")
        special[name] = ids[0]
    lacking = [name for name, token in special.items() if token is None]
    if lacking:
        raise UserError(f"the tokenizer lacks {lacking}: this is not a Janus-Pro tokenizer")
    return special


def load_config(path: str, revision: str | None) -> Any:
    """The config of a Janus checkpoint, from a folder or a hub id.

    Raises:
        UserError: it can be neither found nor downloaded, or is not Janus's; the line names what to
            do.
    """
    return loading.load_config(path, "janus", revision)


def load_pretrained(
    path: str, *, dtype: str, revision: str | None, attn_implementation: str, device: str | None = None
) -> tuple[Any, Any]:
    """Model and checked tokenizer from a folder or a hub id; see `loading.load_model`.

    Raises:
        UserError: the weights can be neither found nor downloaded, or are not Janus's; or see
            `load_tokenizer`.
    """
    from transformers import JanusForConditionalGeneration

    tokenizer = load_tokenizer(path, revision, load_config(path, revision))
    model = loading.load_model(
        JanusForConditionalGeneration,
        path,
        kind="janus",
        dtype=dtype,
        revision=revision,
        device=device,
        attn_implementation=attn_implementation,
    )
    return model, tokenizer


def load_tokenizer(path: str, revision: str | None, config: Any) -> Any:
    """The tokenizer of a Janus checkpoint, checked against its config.

    Raises:
        UserError: it can be neither found nor downloaded, is not a Janus's, or gives the model
            other tokens than its own.
    """
    from transformers import AutoTokenizer

    tokenizer = loading.load_part(AutoTokenizer, path, revision)
    special_ids(tokenizer)
    check_tokenizer(tokenizer, path, rows=config.text_config.vocab_size, needs=("bos", "eos", "pad"))
    return tokenizer


def reader_of(tokenizer: Any, config: Any, chat: Chat, path: str) -> Reader:
    """How a Janus reads prompts: whole, so long as an image's tokens fit behind them."""
    limit = config.text_config.max_position_embeddings - config.vision_config.num_image_tokens - 1  # begin-of-image
    return Reader("Janus", path, [Reading("Janus", tokenizer, limit, worded=chat.image, conversation=True)])
