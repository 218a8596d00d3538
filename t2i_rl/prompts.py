"""Prompts with GenEval-form metadata, and the JSON-lines files that hold them."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from t2i_rl.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One prompt. `meta` holds GenEval's `include`/`exclude` clauses and whatever else its benchmark's judge reads."""

    id: str
    text: str
    tag: str = ""
    meta: dict = field(default_factory=dict)


def write_prompts(path: Path, prompts: list[Prompt]) -> None:
    """Write prompts as JSON lines: `id`, `tag`, `prompt`, then the metadata."""
    lines = [json.dumps({"id": p.id, "tag": p.tag, "prompt": p.text, **p.meta}) for p in prompts]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file: JSON lines with a `prompt` field, or plain text with one prompt a line.

    Raises:
        UserError: the file is missing, empty, or a line is not what it should be (the line is named).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt file {path} does not exist")
    prompts = []
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            prompts.append(Prompt(id=f"{path.stem}/{number:05d}", text=line.strip()))
            continue
        try:
            row = json.loads(line)
            text = row.pop("prompt")
        except (json.JSONDecodeError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a JSON object with a 'prompt' field ({error})") from error
        prompts.append(
            Prompt(id=str(row.pop("id", f"{path.stem}/{number:05d}")), text=text, tag=row.pop("tag", ""), meta=row)
        )
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt")
    return prompts


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
