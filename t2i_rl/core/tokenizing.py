"""What is checked of a tokenizer when it loads, and a user's text inside a conversation."""

import re
from typing import Any

from t2i_rl.core.errors import UserError

SENTENCE = "a red circle, left of 2 blue squares."
LEGACY_END = 2  # with this end in its config, transformers' CLIP pools at the greatest id instead
MARK = "\ufdd0"  # a code point that Unicode keeps free: it stands in no text


def check_tokenizer(
    tokenizer: Any, path: str, *, rows: int, begin: str = "", end: str = "", needs: tuple[str, ...] = ()
) -> None:
    """Whether a tokenizer gives a model the tokens that it was trained on.

    Args:
        rows: tokens that the model has embeddings for.
        begin, end: the tokens that stand in front of every text and behind it, `bos`, `cls`, `eos`
            or `sep`; "" for none. Without both, the caller writes them itself, and the tokenizer's
            own are not looked at.
        needs: further tokens that it must have, such as `pad`.

    Raises:
        UserError: it has other tokens than the model, frames a text otherwise, or loses spaces or
            letters of a sentence.
    """
    greatest = max(tokenizer.get_vocab().values())
    if greatest >= rows:
        raise _unfit(
            path,
            f"has tokens up to number {greatest}, and the model has embeddings for {rows}: they belong to different "
            "checkpoints",
        )
    lacking = [name for name in (begin, end, *needs) if name and getattr(tokenizer, f"{name}_token_id") is None]
    if lacking:
        raise _unfit(path, f"has no {' and no '.join(lacking)} token: check tokenizer_config.json")
    sentence = _known_sentence(tokenizer)
    if not sentence:
        raise _unfit(
            path,
            f"does not give back a single word of {SENTENCE!r}: check tokenizer.json and tokenizer_class",
        )
    if begin or end:
        _check_frame(tokenizer, path, sentence, begin, end)
    again = tokenizer.decode(tokenizer(sentence, add_special_tokens=False).input_ids, skip_special_tokens=True)
    if _cleaned(again) != _cleaned(sentence):
        raise _unfit(
            path,
            f"reads {sentence!r} and gives back {again!r}: tokenizer_class in tokenizer_config.json does not fit "
            "tokenizer.json (set it to PreTrainedTokenizerFast)",
        )


def _check_frame(tokenizer: Any, path: str, sentence: str, begin: str, end: str) -> None:
    """The tokens in front of a text and behind it, once each and no others."""
    framed, plain = tokenizer(sentence).input_ids, tokenizer(sentence, add_special_tokens=False).input_ids
    front, back = ([getattr(tokenizer, f"{name}_token_id")] if name else [] for name in (begin, end))
    expected = [*front, *plain, *back]
    if framed != expected:
        raise _unfit(
            path,
            f"turns a text into {_ends(tokenizer, framed)}, and the model stands on {_ends(tokenizer, expected)}: "
            "check post_processor in tokenizer.json, add_bos_token and add_eos_token",
        )


def check_pooling(tokenizer: Any, path: str, text_config: Any) -> None:
    """Whether a CLIP takes a text's state where its tokenizer ends the text.

    Elsewhere all texts would score alike.

    Raises:
        UserError: it takes it elsewhere.
    """
    pooled, end = text_config.eos_token_id, tokenizer.eos_token_id
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    if pooled == LEGACY_END and words and end < max(words):
        raise _unfit(
            path,
            f"ends a text with token {end}, and the model, with eos_token_id {LEGACY_END} in its text_config, pools "
            f"at the greatest token, {max(words)} or another: set text_config.eos_token_id to the tokenizer's, and "
            f"give its end another number than {LEGACY_END}",
        )
    if pooled not in (LEGACY_END, end):
        raise _unfit(
            path,
            f"ends a text with token {end}, and the model pools at token {pooled} (text_config.eos_token_id in "
            f"config.json), which no text holds: all texts would score alike; set it to {end}",
        )


def check_window(tokenizer: Any, path: str, text_config: Any) -> None:
    """Whether a tokenizer cuts texts to what its encoder has positions for.

    Raises:
        UserError: it leaves them longer.
    """
    longest, positions = tokenizer.model_max_length, text_config.max_position_embeddings
    if longest > positions:
        raise _unfit(
            path,
            f"cuts texts at {longest} tokens, and its encoder has {positions} positions: set model_max_length in "
            f"tokenizer_config.json to {positions}",
        )


def special_texts(tokenizer: Any, *further: str) -> list[str]:
    """The special tokens, and `further` ones, as they are spelt, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens, *further}, key=len, reverse=True)


def marked(text: str, special: list[str]) -> str:
    """A text for a conversation, in which `ids_of` reads the `special` ones as plain letters."""
    text = text.replace(MARK, "")
    for token in special:
        text = text.replace(token, token[0] + MARK + token[1:])
    return text


def ids_of(tokenizer: Any, conversation: str) -> list[int]:
    """Token ids of a conversation whose foreign texts went through `marked`.

    What the tokenizer puts around a text is left out. A mark parts the letters of a special token:
    what is left of it and what is right of it are read one after the other.
    """
    pieces = conversation.split(MARK)
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False).input_ids]


def _unfit(path: str, fault: str) -> UserError:
    return UserError(f"cannot load {path}: its tokenizer {fault}")


def _known_sentence(tokenizer: Any) -> str:
    """The sentence; where the tokenizer does not know all of it, the words that it knows."""
    words = re.findall(r"\w+", SENTENCE)
    known_words = [word for word in words if _survives(tokenizer, word)]
    return SENTENCE if known_words == words and _survives(tokenizer, ",") else " ".join(known_words)


def _survives(tokenizer: Any, word: str) -> bool:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return _cleaned(tokenizer.decode(ids, skip_special_tokens=True)) == word


def _cleaned(text: str) -> str:
    """Without what tokenizers change by intent: upper case, and spaces in front of punctuation."""
    return re.sub(r"\s+([^\w\s])", r"\1", " ".join(text.split())).casefold()


def _ends(tokenizer: Any, ids: list[int]) -> str:
    """The first and last tokens, spelt."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return " ".join(tokens if len(tokens) < 7 else [*tokens[:3], "...", *tokens[-3:]])
