"""What counts as a text that somebody wrote: a prompt, a caption, a name."""

import json
import re
from collections.abc import Sequence

from t2i_rl.core.errors import UserError

CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # of ASCII, without white space: a terminal obeys some of them


def fault_of_text(value: object) -> str | None:
    """What keeps a value from being a text, to go on after a noun (`the prompt ...`), or None."""
    if not isinstance(value, str):
        return f"is no text: {_in_json(value)}"
    if not any(letter.isprintable() and not letter.isspace() for letter in value):
        return "is empty"
    if "\0" in value:
        return f"holds a NUL character: {_in_json(value)}"
    if CONTROLS.search(value):
        return f"holds a control character: {_in_json(value)}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"holds half of a character (a lone surrogate): {_in_json(value)}"
    return None


def check_texts(texts: Sequence[object] | None, setting: str) -> None:
    """Whether a setting's texts, where there is such a list, are some, each a text.

    Raises:
        UserError: there is none in the list, or one is no text.
    """
    if texts is not None and not texts:
        raise UserError(f"{setting} must hold one text or more, or be null")
    for number, text in enumerate(texts or ()):
        if fault := fault_of_text(text):
            raise UserError(f"{setting}[{number}] {fault}")


def is_text(value: object) -> bool:
    return fault_of_text(value) is None


def _in_json(value: object) -> str:
    """The value for a message, cut where it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}..."
