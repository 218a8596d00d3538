"""Prompts with GenEval-form metadata, and the files that hold them."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import Row, json_rows, lines_of, parse_json, read_text, write_atomic
from t2i_rl.core.texts import fault_of_text, is_text

JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
TABLE_ENDINGS = (".csv", ".tsv", ".yaml", ".yml")
JSON_START = re.compile(r'\{|\[\s*("|\{|\n|$)')  # "[red] circle" is a prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    meta: GenEval's `include` and `exclude` clauses, and whatever else its benchmark's judge reads.
    """

    id: str
    text: str
    tag: str = ""
    meta: dict = field(default_factory=dict)


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    """Write prompts as JSON lines: `id`, `tag`, `prompt`, then the metadata."""
    lines = [json.dumps({"id": p.id, "tag": p.tag, "prompt": p.text, **p.meta}) for p in prompts]
    write_atomic(path, "\n".join(lines) + "\n")


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a prompt file: JSON, or plain text with one prompt a line.

    JSON is lines with a `prompt` field each, or one array of such objects or of texts. A file is
    JSON if its name ends so or its first row begins so; then every row has to be. A row of a plain
    text is a prompt unless it is itself a JSON object or list. `id` may be a whole number; none may
    stand twice.

    Raises:
        UserError: the file is missing, empty or a table, or a row is not what it should be (its
            place is named).
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending in TABLE_ENDINGS:
        raise UserError(f"prompt file {path} is a {ending}: give one prompt a line, or JSON lines with 'prompt'")
    text = read_text(path)
    if ending in JSON_ENDINGS or JSON_START.match(text.lstrip()):
        in_array = text.lstrip().startswith("[")
        rows = [_as_object(row) if in_array else row for row in json_rows(path)]
    else:
        rows = [_plain_row(number, f"{path}:{number}", line) for number, line in lines_of(text)]
    if not rows:
        raise UserError(f"prompt file {path} holds no prompt")
    return with_distinct_ids([(row.place, _prompt(row, path.stem)) for row in rows])


def _as_object(row: Row) -> Row:
    return row._replace(value={"prompt": row.value}) if isinstance(row.value, str) else row


def _plain_row(number: int, place: str, line: str) -> Row:
    """A line of a plain text; what a program has written as JSON is never drawn as it stands."""
    if line.startswith("{"):
        return Row(number, place, parse_json(line, place))
    if line.startswith("[") and _is_json(line):
        raise UserError(f"{place}: a JSON list where a prompt is expected")
    return Row(number, place, {"prompt": line})


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _prompt(row: Row, stem: str) -> Prompt:
    if not isinstance(row.value, dict) or "prompt" not in row.value:
        raise UserError(f"{row.place}: not a JSON object with a 'prompt' field")
    meta = dict(row.value)
    text, tag = meta.pop("prompt"), meta.pop("tag", "")
    name = row_id(meta.pop("id", f"{stem}/{row.number:05d}"), row.place)
    if fault := fault_of_text(text):
        raise UserError(f"{row.place}: the prompt {fault}")
    if tag != "" and (fault := fault_of_text(tag)):
        raise UserError(f"{row.place}: the tag {fault}")
    if fault := fault_of_clauses(meta):
        raise UserError(f"{row.place}: {fault}")
    return Prompt(name, text, tag, meta)


def row_id(value: object, place: str) -> str:
    """The id of a row as text; a whole number is written out.

    Raises:
        UserError: it is neither.
    """
    if type(value) is not int and (fault := fault_of_text(value)):
        raise UserError(f"{place}: the id {fault}")
    return str(value)


def with_distinct_ids(placed: Sequence[tuple[str, Prompt]]) -> list[Prompt]:
    """The prompts of `(place in a file, prompt)`: seeds come from ids, and results go by them.

    Raises:
        UserError: an id stands twice; both places are named.
    """
    place_of_id: dict[str, str] = {}
    for place, prompt in placed:
        if prompt.id in place_of_id:
            raise UserError(f"{place}: the id {prompt.id!r} stands already at {place_of_id[prompt.id]}")
        place_of_id[prompt.id] = place
    return [prompt for _, prompt in placed]


def fault_of_clauses(meta: dict) -> str | None:
    """What keeps `include` and `exclude` from being GenEval's lists of clauses, or None."""
    for key in ("include", "exclude"):
        clauses = meta.get(key, [])
        if not isinstance(clauses, list):
            return f"{key} is no list of clauses: {clauses!r}"
        for number, clause in enumerate(clauses):
            if not isinstance(clause, dict) or not is_text(clause.get("class")):
                return f"{key} has a clause without a class: {clause!r}"
            if type(clause.get("count")) is not int or clause["count"] < 1:
                return f"{key} has a clause without a count of 1 or more: {clause!r}"
            if "position" in clause and not _is_position(clause["position"], number):
                return f"{key} has a position that is not [relation, number of an earlier clause]: {clause!r}"
            strange = [name for name in ("color", "texture", "size") if not is_text(clause.get(name, "any"))]
            if strange:
                return f"{key} has a {strange[0]} that is no word: {clause!r}"
    return None


def _is_position(value: object, number: int) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_text(value[0]) and value[1] in range(number)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
