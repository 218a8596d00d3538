"""What an encoder does not read of a text: said once a run, or refused.

A text that is longer than what an encoder reads, or has words that it does not know, is said so of.
A special token that is spelt in a text is refused.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.ranks import is_main_process

SHOWN_WORDS, SHOWN_LETTERS = 5, 80
BATCH = 1000
FRAME = 3  # tokens around a text, and one for a space that T5 puts in front
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}
_announced: set[str] = set()  # what this run has said of its texts before its weights were loaded


def forget_announcements() -> None:
    """A new run says everything again."""
    _announced.clear()


@dataclass(frozen=True)
class Reading:
    """How one encoder reads a text.

    Args:
        encoder: its name for the user.
        tokenizer: of transformers.
        limit: tokens that it reads, those around the text among them; None: any number.
        worded: the text with the wording that is tokenised around it.
        conversation: the text stands in a conversation, where `tokenizing.marked` keeps its special
            tokens apart. Nothing is cut there: a text that is too long is refused.
    """

    encoder: str
    tokenizer: Any
    limit: int | None = None
    worded: Callable[[str], str] = str
    conversation: bool = False

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text in its wording, where that may be longer than the limit; else 0.

        A token has one letter or more, so that a text of few letters need not be tokenised.
        """
        limit = math.inf if self.limit is None else self.limit
        worded_texts = [self.worded(text) for text in texts]
        long_texts = [text for text in worded_texts if not text.isascii() or len(text) + FRAME > limit]
        counts = dict(zip(long_texts, map(len, self._rows(long_texts)), strict=True))
        return [counts.get(text, 0) for text in worded_texts]

    def unknown_words(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """The words that the tokenizer has no token for, by the texts that have such words."""
        unknown_id = self.tokenizer.unk_token_id
        if unknown_id is None:
            return {}
        rows = zip(texts, self._rows(texts, **PLAIN), strict=True)
        return {text: self._unknown_words(text, unknown_id) for text, ids in rows if unknown_id in ids}

    def _unknown_words(self, text: str, unknown_id: int) -> list[str]:
        encoded = self.tokenizer(text, verbose=False, return_offsets_mapping=True, **PLAIN)
        pairs = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        return list(dict.fromkeys(_word_at(text, start) for token, (start, _) in pairs if token == unknown_id))

    def _rows(self, texts: Sequence[str], **settings: bool) -> Iterator[list[int]]:
        for first in range(0, len(texts), BATCH):
            yield from self.tokenizer(texts[first : first + BATCH], verbose=False, **settings).input_ids

    def special_tokens(self, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Pairs of a text and a special token that it spells and that is not read as plain text."""
        special_tokens = [] if self.conversation else self.tokenizer.all_special_tokens
        for text in texts:
            lowered = text.casefold()
            for token in special_tokens:
                if token.casefold() not in lowered:
                    continue
                ids = self.tokenizer(text, verbose=False, **PLAIN).input_ids
                if self.tokenizer.convert_tokens_to_ids(token) in ids:
                    yield text, token


@dataclass
class Reader:
    """All the encoders of a model or a reward.

    `part` is the user's name for it, `path` its checkpoint's.
    """

    part: str
    path: str
    readings: list[Reading]
    _checked_texts: set[str] = field(default_factory=set)
    _said_lines: set[str] = field(default_factory=set)

    def announce(self, texts: Iterable[str]) -> None:
        """Say what is not read of all texts of a run, before weights load.

        Raises:
            UserError: see `check`.
        """
        _announced.update(self._say(list(dict.fromkeys(texts))))

    def check(self, texts: Iterable[str]) -> None:
        """Say what is not read of texts that are about to be encoded, once a run.

        Raises:
            UserError: a text spells a special token that its tokenizer cannot read as text, or is
                too long for a conversation.
        """
        new_texts = [text for text in dict.fromkeys(texts) if text not in self._checked_texts]
        self._said_lines.update(self._say(new_texts))
        self._checked_texts.update(new_texts)

    def _say(self, texts: list[str]) -> list[str]:
        """What was said, by the names that keep it from being said again."""
        texts = [text for text in texts if text]
        if not texts:
            return []
        self._refuse_special_tokens(texts)
        lines = {"cut": self._cut(texts), "unknown": self._unknown(texts)}
        names = {f"{self.part} {self.path} {kind}": line for kind, line in lines.items() if line}
        for name, line in names.items():
            if name not in self._said_lines | _announced and is_main_process():
                print(line, flush=True)
        return list(names)

    def _refuse_special_tokens(self, texts: list[str]) -> None:
        for reading in self.readings:
            for text, token in reading.special_tokens(texts):
                raise UserError(
                    f"{self.part}: the prompt {_short(text)!r} holds {token!r}, which {reading.encoder} reads as "
                    "a special token and not as text: reword it"
                )

    def _cut(self, texts: list[str]) -> str | None:
        """The line about texts that are longer than what is read."""
        sentences, encoders_of_all = [], []
        for reading in self.readings:
            if reading.limit is None:
                continue
            counts = reading.lengths(texts)
            too_long = [number for number, count in enumerate(counts) if count > reading.limit]
            if not too_long:
                encoders_of_all.append(reading.encoder)
                continue
            share = f"{len(too_long)} of {len(texts)} prompts are longer than the {reading.limit} tokens that "
            share += reading.encoder
            first = f"first ({counts[too_long[0]]} tokens) {_short(texts[too_long[0]])!r}"
            if reading.conversation:
                raise UserError(f"{self.part}: {share} has room for: {first}; shorten them")
            sentences.append(f"{share} reads, and are cut there: {first}")
        if not sentences:
            return None
        uncut = f" ({' and '.join(dict.fromkeys(encoders_of_all))} reads them whole)" if encoders_of_all else ""
        return f"{self.part}: {'; '.join(dict.fromkeys(sentences))}{uncut}"

    def _unknown(self, texts: list[str]) -> str | None:
        """The line about words that an encoder does not know."""
        sentences = []
        for reading in self.readings:
            words_of_text = reading.unknown_words(texts)
            if not words_of_text:
                continue
            words = list(dict.fromkeys(word for words in words_of_text.values() for word in words))
            some_words = ", ".join(map(repr, words[:SHOWN_WORDS])) + ", ..." * (len(words) > SHOWN_WORDS)
            sentences.append(
                f"{len(words_of_text)} of {len(texts)} prompts have words that {reading.encoder} does not know, and "
                f"reads as {reading.tokenizer.unk_token}: {some_words}; first in {_short(next(iter(words_of_text)))!r}"
            )
        return f"{self.part}: {'; '.join(dict.fromkeys(sentences))}" if sentences else None


class ReadsTexts:
    """A reward or a model whose encoders read texts, by its `reader`."""

    reader: Reader

    def texts_of(self, prompt: Prompt) -> list[str]:
        """What its encoders are given for a prompt."""
        return [prompt.text]

    @classmethod
    def text_reader(cls, settings: Mapping[str, Any]) -> Reader | None:
        """The reader of a config's checkpoint: its tokenizers are read, and no weights.

        None where the encoders are known only once the weights are loaded.

        Raises:
            UserError: they can be neither found nor downloaded, or do not fit the encoders.
        """
        return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."


def _word_at(text: str, index: int) -> str:
    """The letters around an index, up to the next white space on both sides."""
    words_before = text[:index].split()
    start = index - len(words_before[-1]) if words_before and not text[index - 1].isspace() else index
    return (text[start:].split() or [""])[0]
