"""Who answers questions about pictures: a server that speaks OpenAI's protocol, or a model on this machine."""

import base64
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import torch
from PIL import Image

from t2i_rl.core import loading
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Device, Dtype, Positive, Temperature, Whole
from t2i_rl.core.tokenizing import check_tokenizer, special_texts
from t2i_rl.methods.irg.toy_format import png

if TYPE_CHECKING:  # what only the writer in use imports
    from huggingface_hub import ChatCompletionOutputComplete

Asked = tuple[str, list[np.ndarray]]
FAILURES = (httpx.HTTPError, OSError, ValueError, LookupError, TypeError)  # no connection, no JSON, no choice in it


class ChatWriter:
    """A vision-language model behind `<url>/chat/completions`; the key comes from the environment and is shown nowhere.

    Args:
        url: the server, e.g. `http://localhost:8000/v1` (vLLM, SGLang, OpenAI).
        model: its name there.
        key_env: the environment variable that holds the key.
        workers: questions on their way at a time; retries: of one that failed, at growing distances.

    Raises:
        UserError: the variable is not set, or a question failed for good.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "T2I_RL_WRITER_KEY",
        workers: Count = 8,
        retries: Whole = 4,
        timeout: Positive = 120.0,
        max_tokens: Count = 1024,
        temperature: Temperature = 0.0,
    ):
        from huggingface_hub import InferenceClient

        key = os.environ.get(key_env)
        if not key:
            raise UserError(
                f"{key_env} is not set: export the key of {url} in it (any word, where the server asks for none)"
            )
        self.url, self.model, self.workers, self.retries = url, model, workers, retries
        self.max_tokens, self.temperature = max_tokens, temperature
        self.client = InferenceClient(base_url=url, api_key=key, timeout=timeout)

    def check(self, texts: Sequence[str]) -> None:
        """Any text: what it is turned into is the server's affair."""

    def settings(self) -> dict:
        return {"name": "chat", "url": self.url, "model": self.model, "temperature": self.temperature}

    def answer(self, asked: Sequence[Asked]) -> list[str | None]:
        """One text a question with its pictures uint8 `(H, W, 3)`, in order; None where it was cut at `max_tokens`."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._one, asked))

    def _one(self, asked: Asked) -> str | None:
        question, images = asked
        urls = [f"data:image/png;base64,{base64.b64encode(png(image)).decode()}" for image in images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        reply = self._reply([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
        return None if reply.finish_reason == "length" else (reply.message.content or "").strip()

    def _reply(self, messages: list[dict]) -> "ChatCompletionOutputComplete":
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), 30))
            try:
                reply = self.client.chat_completion(
                    messages, model=self.model, max_tokens=self.max_tokens, temperature=self.temperature
                )
                return reply.choices[0]
            except FAILURES as error:
                failure = error
        raise UserError(
            f"{self.url} did not answer in {self.retries + 1} tries ({loading.first_line(failure)}); what is finished "
            "stays, the same command goes on from there"
        ) from failure


class LocalWriter:
    """A vision-language model of transformers (`AutoModelForImageTextToText`), asked greedily.

    Args:
        path: a folder or a hub id.
        batch_size: questions answered together.

    Raises:
        UserError: it cannot be loaded, has no chat template, or a tokenizer that does not fit it.
    """

    def __init__(
        self,
        path: str,
        dtype: Dtype = "bfloat16",
        device: Device | None = "auto",
        revision: str | None = None,
        batch_size: Count = 8,
        max_tokens: Count = 1024,
    ):
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        config = loading.load_part(AutoConfig, path, revision)
        self.path, self.batch_size, self.max_tokens = str(path), batch_size, max_tokens
        self.processor = loading.load_part(AutoProcessor, path, revision)
        if not getattr(self.processor, "chat_template", None):
            raise UserError(f"{path} has no chat template: take a model that is tuned to follow instructions")
        check_tokenizer(self.processor.tokenizer, path, rows=config.get_text_config().vocab_size, needs=("pad",))
        self.processor.tokenizer.padding_side = "left"
        settings = {"kind": config.model_type, "dtype": dtype, "revision": revision, "device": device}
        self._load = partial(loading.load_model, AutoModelForImageTextToText, path, **settings)

    @cached_property
    def model(self) -> Any:
        """A model of transformers. Loaded for the first question: everything else is checked before."""
        return self._load()

    def check(self, texts: Sequence[str]) -> None:
        """Refuse texts that the chat template would put as special tokens into the conversation.

        Raises:
            UserError: one line that names the first, and the token.
        """
        special = special_texts(self.processor.tokenizer)
        for text in texts:
            if token := next((token for token in special if token in text), None):
                raise UserError(
                    f"the writer {self.path} reads {token!r} as a special token, and the prompt {text!r} holds it: "
                    "reword it"
                )

    def settings(self) -> dict:
        return {"name": "local", "path": self.path}

    @torch.no_grad()
    def answer(self, asked: Sequence[Asked]) -> list[str | None]:
        """One text a question with its pictures uint8 `(H, W, 3)`, in order; None where it was cut at `max_tokens`."""
        answers = []
        for first in range(0, len(asked), self.batch_size):
            answers += self._answered(asked[first : first + self.batch_size])
        return answers

    def _answered(self, asked: Sequence[Asked]) -> list[str | None]:
        inputs = self.processor.apply_chat_template(
            [_chat(question, images) for question, images in asked],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        written = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=written.device)
        ended = torch.isin(written, ends).any(dim=1).tolist()
        return [text.strip() if end else None for text, end in zip(texts, ended, strict=True)]


def _chat(question: str, images: list[np.ndarray]) -> list[dict]:
    """A conversation of one turn, the pictures in front of the question."""
    pictures = [{"type": "image", "image": Image.fromarray(image)} for image in images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
