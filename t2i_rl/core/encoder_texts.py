"""What an encoder reads of a text: said once a run where it is less than the whole, refused where it is something
else."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

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
        conversation: the text stands in a conversation, where `tokenizing.marked` keeps its special tokens apart.
            Nothing is cut
            there: a text that is too long is refused.
    """

    encoder: str
    tokenizer: object
    limit: int | None = None
    worded: Callable[[str], str] = str
    conversation: bool = False

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text in its wording; 0 for one of too few letters to be longer than the limit (a token has one
        or more)."""
        worded = [self.worded(text) for text in texts]
        long = [text for text in worded if not text.isascii() or len(text) + FRAME > self.limit]
        counts = dict(zip(long, (len(row) for row in self._rows(long)), strict=True))
        return [counts.get(text, 0) for text in worded]

    def unknown_words(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """The words of each text that the tokenizer has no token for; texts without such words are left out."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return {}
        rows = zip(texts, self._rows(texts, **PLAIN), strict=True)
        return {text: self._unknown_words(text, unknown) for text, row in rows if unknown in row}

    def _unknown_words(self, text: str, unknown: int) -> list[str]:
        encoded = self.tokenizer(text, verbose=False, return_offsets_mapping=True, **PLAIN)
        pairs = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        return list(dict.fromkeys(_word_at(text, start) for token, (start, _) in pairs if token == unknown))

    def _rows(self, texts: Sequence[str], **settings) -> Iterator[list[int]]:
        for first in range(0, len(texts), BATCH):
            yield from self.tokenizer(texts[first : first + BATCH], verbose=False, **settings).input_ids

    def special_tokens(self, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Texts that spell a special token which the tokenizer would not read as plain text, each with the token."""
        special = (
            [] if self.conversation else [(token, token.casefold()) for token in self.tokenizer.all_special_tokens]
        )
        for text in texts:
            lowered = text.casefold()
            for token in [token for token, spelt in special if spelt in lowered]:
                ids = self.tokenizer(text, verbose=False, **PLAIN).input_ids
                if self.tokenizer.convert_tokens_to_ids(token) in ids:
                    yield text, token


@dataclass
class Reader:
    """All the encoders of a model or a reward: `part`, the user's name for it, and the `path` of its checkpoint."""

    part: str
    path: str
    readings: list[Reading]
    _known: set[str] = field(default_factory=set)
    _said: set[str] = field(default_factory=set)

    def announce(self, texts: Iterable[str]) -> None:
        """Say what is not read of all texts of a run, before weights load.

        Raises:
            UserError: see `check`.
        """
        _announced.update(self._say(list(dict.fromkeys(texts))))

    def check(self, texts: Iterable[str]) -> None:
        """Say what is not read of texts that are about to be encoded, where this run has not said so yet.

        Raises:
            UserError: a text spells a special token that its tokenizer cannot read as text, or is too long for a
                conversation.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._said.update(self._say(new))
        self._known.update(new)

    def _say(self, texts: list[str]) -> list[str]:
        """What was said, by the names that keep it from being said again."""
        texts = [text for text in texts if text]
        if not texts:
            return []
        self._refuse_special_tokens(texts)
        lines = {"cut": self._cut(texts), "unknown": self._unknown(texts)}
        names = {f"{self.part} {self.path} {kind}": line for kind, line in lines.items() if line}
        for name, line in names.items():
            if name not in self._said | _announced and is_main_process():
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
        limited = [reading for reading in self.readings if reading.limit is not None]
        lengths = [(reading, reading.lengths(texts)) for reading in limited]
        parts = []
        for reading, counts in lengths:
            over = [number for number, count in enumerate(counts) if count > reading.limit]
            if not over:
                continue
            share = f"{len(over)} of {len(texts)} prompts are longer than the {reading.limit} tokens that "
            share += reading.encoder
            first = f"first ({counts[over[0]]} tokens) {_short(texts[over[0]])!r}"
            if reading.conversation:
                raise UserError(f"{self.part}: {share} has room for: {first}; shorten them")
            parts.append(f"{share} reads, and are cut there: {first}")
        whole = [reading.encoder for reading, counts in lengths if max(counts) <= reading.limit]
        rest = f" ({' and '.join(dict.fromkeys(whole))} reads them whole)" if parts and whole else ""
        return f"{self.part}: {'; '.join(dict.fromkeys(parts))}{rest}" if parts else None

    def _unknown(self, texts: list[str]) -> str | None:
        """The line about words that an encoder does not know."""
        parts = []
        for reading in self.readings:
            words = reading.unknown_words(texts)
            if not words:
                continue
            every = list(dict.fromkeys(word for unknown in words.values() for word in unknown))
            shown = ", ".join(map(repr, every[:SHOWN_WORDS])) + ", ..." * (len(every) > SHOWN_WORDS)
            parts.append(
                f"{len(words)} of {len(texts)} prompts have words that {reading.encoder} does not know, and reads as "
                f"{reading.tokenizer.unk_token}: {shown}; first in {_short(next(iter(words)))!r}"
            )
        return f"{self.part}: {'; '.join(dict.fromkeys(parts))}" if parts else None


class ReadsTexts:
    """A reward or a model whose encoders read texts, by its `reader`."""

    reader: Reader

    def texts_of(self, prompt: Prompt) -> list[str]:
        """What its encoders are given for a prompt."""
        return [prompt.text]

    @classmethod
    def text_reader(cls, settings: dict) -> Reader | None:
        """The reader of a config's checkpoint: its tokenizers are read and no weights. None: known only once it is
        loaded.

        Raises:
            UserError: they can be neither found nor downloaded, or do not fit the encoders.
        """
        return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 3]}..."


def _word_at(text: str, place: int) -> str:
    """The letters around a place up to the next white space."""
    before = text[:place].split()
    start = place - len(before[-1]) if before and not text[place - 1].isspace() else place
    return (text[start:].split() or [""])[0]
