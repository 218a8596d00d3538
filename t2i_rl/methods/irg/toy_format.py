"""IRG's published data format, both ways: a folder a mode, parquet, one column `conversation` of JSON.

What the released parser drops in silence is an error here: a broken picture, a picture without a flag, a role or a key
that it does not know.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import parse_json, write_atomic
from t2i_rl.core.pixels import read_image
from t2i_rl.core.texts import fault_of_text
from t2i_rl.methods.irg.trajectory import MODES, Trajectory, in_mode
from t2i_rl.models.autoregressive.segments import GENERATION, UNDERSTANDING, Segment

COLUMN = "conversation"
KEYS = {"user": {"role", "content", "need_loss"}, "assistant": {"role", "content"}}
PART_KEYS = {
    "text": {"type", "content", "need_loss"},
    "image": {"type", "content", "need_loss", "need_vae", "need_vit"},
}


def read_toy(folder: Path) -> Iterator[tuple[str, Trajectory]]:
    """`(mode, trajectory)` of every row below `folder`, mode by mode, shard by shard.

    Raises:
        UserError: a file, a row or a field is not of the format; the line names file, row and field.
    """
    folders = [Path(folder) / mode for mode in MODES if (Path(folder) / mode).is_dir()]
    if not folders:
        raise UserError(f"{folder} has no folder named as a mode is: {', '.join(MODES)}")
    for place in folders:
        shards = sorted(place.glob("*.parquet"))
        if not shards:
            raise UserError(f"{place} holds no parquet file")
        for shard in shards:
            yield from ((place.name, trajectory) for trajectory in read_shard(shard, place.name))


def read_shard(shard: Path, mode: str) -> Iterator[Trajectory]:
    """The rows of one file of a mode.

    Raises:
        UserError: see `read_toy`.
    """
    for row, text in enumerate(raw_rows(shard)):
        yield parsed(text, mode, shard, row)


def raw_rows(shard: Path) -> Iterator[str]:
    """The JSON of each row of a file.

    Raises:
        UserError: it is no parquet file with a column of conversations.
    """
    try:
        for batch in _opened(shard).iter_batches(batch_size=16, columns=[COLUMN]):
            yield from batch[COLUMN].to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{shard}: the file is damaged ({reason}): delete it and make or fetch it anew") from error


def parsed(text: str, mode: str, shard: Path, row: int) -> Trajectory:
    """One row's JSON as a trajectory, its pictures decoded.

    Raises:
        UserError: see `read_toy`.
    """
    where = f"{shard}: row {row}"
    return Trajectory(in_mode(segments_of(text, where), mode, where))


def count_rows(shard: Path) -> int:
    """How many rows a file has, from its footer.

    Raises:
        UserError: it is no parquet file with a column of conversations.
    """
    return _opened(shard).metadata.num_rows


def _opened(shard: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(shard)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{shard}: not a parquet file ({str(error).splitlines()[0]})") from error
    if COLUMN not in file.schema_arrow.names:
        raise UserError(f"{shard}: there is no column {COLUMN!r}, only {', '.join(file.schema_arrow.names)}")
    return file


def segments_of(text: str, where: str) -> list[Segment]:
    """The segments of one row's JSON, roles still to be given by the mode.

    Raises:
        UserError: `where`, the turn, the part and the field that is wrong.
    """
    turns = parse_json(text, f"{where}: {COLUMN}")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {COLUMN} is no list of turns")
    segments = []
    for number, turn in enumerate(turns):
        place = f"{where}, turn {number}"
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in KEYS:
            raise UserError(f"{place}: role is {role!r}, and only {', '.join(KEYS)} are known")
        _known(turn, KEYS[role], place)
        if role == "user":
            content = turn.get("content")
            if not isinstance(content, str):
                raise UserError(f"{place}: a user's content must be a text, not {type(content).__name__}")
            _check_letters(content, place)
            segments.append(Segment("", text=content, loss=_flag(turn, "need_loss", False, place)))
            continue
        if not isinstance(turn.get("content"), list):
            raise UserError(f"{place}: an assistant's content must be a list of parts")
        segments += [_part(part, f"{place}, part {index}") for index, part in enumerate(turn["content"])]
    return segments


def _part(part: dict, where: str) -> Segment:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PART_KEYS:
        raise UserError(f"{where}: type is {kind!r}, and only {', '.join(PART_KEYS)} are known")
    _known(part, PART_KEYS[kind], where)
    if not isinstance(part.get("content"), str):
        raise UserError(f"{where}: content must be a text")
    if kind == "text":
        _check_letters(part["content"], where)
        return Segment("", text=part["content"], loss=_flag(part, "need_loss", True, where))
    loss, vae, vit = (_flag(part, name, False, where) for name in ("need_loss", "need_vae", "need_vit"))
    if not (loss or vae or vit):
        raise UserError(
            f"{where}: a picture that is neither learnt nor seen: say need_loss, or need_vae and need_vit (they "
            "default to false)"
        )
    try:
        content = base64.b64decode(part["content"], validate=True)
    except ValueError as error:
        raise UserError(f"{where}: content is no picture in base64 ({error})") from error
    picture = read_image(content, f"{where}: content")
    seen = frozenset(name for name, flag in ((GENERATION, vae), (UNDERSTANDING, vit)) if flag)
    return Segment("", image=np.asarray(picture), loss=loss, seen_by=seen)


def _check_letters(text: str, where: str) -> None:
    if text.strip() and (fault := fault_of_text(text)):
        raise UserError(f"{where}: content {fault}")


def _known(node: dict, keys: set[str], where: str) -> None:
    unknown = sorted(set(node) - keys)
    if unknown:
        raise UserError(f"{where}: the field {unknown[0]!r} is not known; there are {', '.join(sorted(keys))}")


def _flag(node: dict, name: str, default: bool, where: str) -> bool:
    value = node.get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name} must be true or false, not {value!r}")
    return value


def conversation(segments: Sequence[Segment]) -> str:
    """One row's JSON, every flag written out. Prompts, questions and the system's text are the user's."""
    turns: list[dict] = []
    for segment in segments:
        if segment.role in ("system", "prompt", "question"):
            turns.append({"role": "user", "content": segment.text, "need_loss": segment.loss})
            continue
        if not turns or turns[-1]["role"] != "assistant":
            turns.append({"role": "assistant", "content": []})
        turns[-1]["content"].append(_as_part(segment))
    return json.dumps(turns, ensure_ascii=False)


def _as_part(segment: Segment) -> dict:
    if segment.image is None:
        return {"type": "text", "content": segment.text, "need_loss": segment.loss}
    return {
        "type": "image",
        "content": base64.b64encode(png(segment.image)).decode(),
        "need_loss": segment.loss,
        "need_vae": GENERATION in segment.seen_by,
        "need_vit": UNDERSTANDING in segment.seen_by,
    }


def png(image: np.ndarray) -> bytes:
    """A picture uint8 `(H, W, 3)` as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_shard(path: Path, trajectories: Sequence[Trajectory]) -> None:
    """One parquet shard, written whole or not at all."""
    file = io.BytesIO()
    pq.write_table(pa.table({COLUMN: [conversation(trajectory.segments) for trajectory in trajectories]}), file)
    write_atomic(path, file.getvalue())
