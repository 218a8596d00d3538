"""Files that are whole or not there, and text that every reader reads alike."""

import codecs
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from t2i_rl.core.errors import UserError


@contextmanager
def replacing(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` at the end.

    It lies beside `path` and not in the temporary folder: a rename between two file systems is a
    copy, which a kill or a full disk cuts short. After an error `path` is what it was before.

    Args:
        durable: whether it has to outlive a power cut, which costs 10 ms; images by the thousand
            need not, since the records that make them count are written after them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)  # else a power cut may forget the rename
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, a crash or a full disk never meets half of it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to write files into, which takes the place of `path` at the end.

    What was in `path` is gone then.
    """
    path = Path(path)
    temporary, before = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.before")
    if before.exists() and not path.exists():  # a kill came between the two renames
        before.rename(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():
            path.rename(before)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems refuse to sync a folder
            raise
    finally:
        os.close(descriptor)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a name with a NUL in it
        raise UserError(f"{path} cannot be read: {error}") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, as `decoded` gives it.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    return decoded(read_bytes(path), str(path))


def decoded(content: bytes, name: str) -> str:
    """Bytes as UTF-8 text without a byte-order mark, every line ended by a line feed alone.

    Raises:
        UserError: they are UTF-16, not UTF-8, or hold a NUL; the line says so of `name`.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name} is UTF-16 text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error}): save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{name}:{line}: a NUL byte: this is no text, or UTF-16 without its mark; save it as UTF-8")
    return text


def lines_of(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, each with its number from 1. A line ends at a line feed and nowhere
    else: U+2028 and U+0085 are text. A byte-order mark in front of a line comes of joined files and
    is no part of it.
    """
    lines = [(number, line.lstrip("\ufeff").strip()) for number, line in enumerate(text.split("\n"), start=1)]
    return [(number, line) for number, line in lines if line]


def read_json(path: str | Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    return parse_json(read_text(path), str(path), constant=float)


def read_object(path: str | Path, *keys: str) -> dict[str, Any]:
    """Parse a JSON file that holds one object.

    Raises:
        UserError: the file is missing or not JSON, holds something else, or lacks one of the keys.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    lacking = next((key for key in keys if key not in content), None)
    if lacking is not None:
        raise UserError(f"{path}: the key '{lacking}' is missing")
    return content


class Row(NamedTuple):
    """A row of a file.

    number: counts from 1; of a line, blank ones are counted too. place: what an error calls it.
    """

    number: int
    place: str
    value: Any


def json_rows(path: str | Path) -> list[Row]:
    """Every row of a JSON-lines file without blank lines, or of a file that is one JSON array.

    Raises:
        UserError: it cannot be read, or a row is not JSON; its place is named.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        values = parse_json(text, str(path))
        return [Row(number, f"{path}: row {number}", value) for number, value in enumerate(values, start=1)]
    return [Row(number, f"{path}:{number}", parse_json(line, f"{path}:{number}")) for number, line in lines_of(text)]


def read_json_lines(path: str | Path) -> list[Row]:
    """The rows of `json_rows`, every one an object.

    Raises:
        UserError: see `json_rows`; or a row is no JSON object.
    """
    rows = json_rows(path)
    for row in rows:
        if not isinstance(row.value, dict):
            raise UserError(f"{row.place}: expected a JSON object, found {json.dumps(row.value)[:60]}")
    return rows


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def parse_json(text: str, place: str, constant: Callable[[str], float] = _no_number) -> Any:
    """JSON as Python has it.

    Args:
        place: what an error begins with.
        constant: what NaN and Infinity become, which JSON does not have.

    Raises:
        UserError: it is not JSON, or an object has a key twice.
    """
    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=_distinct)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return keys
