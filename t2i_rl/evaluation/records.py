"""Reading and writing what a run leaves behind: records.jsonl, results.json, and a finished job as a whole."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, read_json_lines, read_text, write_atomic
from t2i_rl.evaluation.older import record_now, results_now
from t2i_rl.evaluation.stage import STAGES

RECORD_KEYS = (
    *("prompt_id", "prompt", "tag", "seen", "sample_index", "seed", "plan", "plan_length"),
    *("strict", "lenient", "score", "measured", "defects", "image"),
)
RESULT_KEYS = ("task", "method", "model", "reward", "seed", "steps", "benchmark", "stages", "comparisons", "headline")
METRIC_KEYS = ("mean", "low", "high", "n_prompts")
COLUMN_KEYS = ("name", "label", "digits")
TABLE_KEYS = ("title", "note", "columns", "stages", "pairs")
DIFFERENCE_KEYS = ("difference", "low", "high", "p_value", "n_prompts")


@dataclass(frozen=True)
class Job:
    """A finished run: its folder, its results.json, and its settings as text (results', then Hydra's overrides)."""

    folder: Path
    results: dict
    settings: dict[str, str]


def not_finite(value: Any, where: str = "") -> Iterator[str]:
    """Dotted paths of every NaN or infinity in nested dicts and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from not_finite(item, f"{where}.{key}" if where else str(key))


def require(holder: Any, keys: Sequence[str], where: str) -> None:
    """Raise a UserError that names the place and the first key that is missing."""
    if not isinstance(holder, dict):
        raise UserError(f"{where}: expected an object, found {type(holder).__name__}")
    for key in keys:
        if key not in holder:
            raise UserError(f"{where}: the key '{key}' is missing")


def require_list(value: Any, where: str) -> None:
    """Raise a UserError that names the place unless the value is a list."""
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, found {type(value).__name__}")


def check_results(results: Any, path: Path) -> None:
    """Raise a UserError that names file and key unless `results` has the form in docs/records.md."""
    require(results, RESULT_KEYS, f"{path}")
    require(results["benchmark"], ("name",), f"{path}: benchmark")
    require(results["stages"], (), f"{path}: stages")
    require_list(results["comparisons"], f"{path}: comparisons")
    for stage, content in results["stages"].items():
        require(content, ("metrics",), f"{path}: stages.{stage}")
        require(content["metrics"], (), f"{path}: stages.{stage}.metrics")
        for name, metric in content["metrics"].items():
            require(metric, METRIC_KEYS, f"{path}: stages.{stage}.metrics.{name}")
    for number, comparison in enumerate(results["comparisons"]):
        require(comparison, ("a", "b", "metrics"), f"{path}: comparisons.{number}")
        require(comparison["metrics"], (), f"{path}: comparisons.{number}.metrics")
        for name, metric in comparison["metrics"].items():
            require(metric, DIFFERENCE_KEYS, f"{path}: comparisons.{number}.metrics.{name}")
    check_shown(results.get("columns", {}), results.get("tables", []), path)  # which 0.1 did not write


def check_shown(columns: Any, tables: Any, path: Path) -> None:
    """The same of what results.json says of its metrics: how tables show them, and which tables there are."""
    require(columns, (), f"{path}: columns")
    for name, column in columns.items():
        require(column, COLUMN_KEYS, f"{path}: columns.{name}")
    require_list(tables, f"{path}: tables")
    for number, table in enumerate(tables):
        require(table, TABLE_KEYS, f"{path}: tables.{number}")
        require_list(table["columns"], f"{path}: tables.{number}.columns")
        for column in table["columns"]:
            require(column, COLUMN_KEYS, f"{path}: tables.{number}.columns")


def write_results(path: Path, results: dict) -> None:
    """Write results.json atomically.

    Raises:
        ValueError: a number is NaN or infinite (its place is named).
        UserError: a required key is missing.
    """
    for where in not_finite(results):
        raise ValueError(f"{path}: {where} is not finite")
    check_results(results, path)
    write_atomic(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def read_results(path: Path) -> dict:
    """Read and check results.json, in today's form where an older version wrote it.

    Raises:
        UserError: the file is missing, not JSON, lacks a key or has a number that is not finite; both are named.
    """
    results = read_json(path)
    for where in not_finite(results):
        raise UserError(f"{path}: {where} is not finite")
    check_results(results, path)
    return results_now(results)


def write_records(path: Path, records: Sequence[dict]) -> None:
    """Write records.jsonl atomically, one image a line.

    Raises:
        ValueError: a number is NaN or infinite (its place is named).
        UserError: a required key is missing.
    """
    for number, record in enumerate(records, start=1):
        require(record, RECORD_KEYS, f"{path}:{number}")
        for where in not_finite(record):
            raise ValueError(f"{path}:{number}: {where} is not finite")
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict]:
    """Read records.jsonl, in today's form where an older version wrote it.

    Raises:
        UserError: the file is missing, or a line is not a record (file, line and key are named), or the image of an
            earlier one.
    """
    records: dict[tuple[str, int], dict] = {}
    for _, place, row in read_json_lines(path):
        record = record_now(row)
        require(record, RECORD_KEYS, place)
        if type(record["prompt_id"]) is not str or type(record["sample_index"]) is not int:
            raise UserError(f"{place}: prompt_id must be a text and sample_index a whole number")
        key = (record["prompt_id"], record["sample_index"])
        if key in records:
            raise UserError(f"{place}: sample {key[1]} of {key[0]!r} stands twice")
        records[key] = record
    return list(records.values())


def stages_of(results: dict) -> list[str]:
    """The stages of a run in the order in which they can be asked for, any other after them as they stand."""
    return sorted(results["stages"], key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))


def headline_comparison(results: dict) -> dict | None:
    """The comparison that a run is about, as its headline names it; None where nothing was trained."""
    headline = results["headline"] or {}
    pair = (headline.get("a"), headline.get("b"))
    comparisons = results["comparisons"]
    return next((comparison for comparison in comparisons if (comparison["a"], comparison["b"]) == pair), None)


def read_stage(folder: Path, stage: str) -> dict[tuple[str, int], dict]:
    """The records of one stage of the run in `folder`, in file order, by (prompt_id, sample_index).

    Raises:
        UserError: see `read_records`.
    """
    records = read_records(Path(folder) / "evaluation" / stage / "records.jsonl")
    return {(record["prompt_id"], record["sample_index"]): record for record in records}


def image_path(folder: Path, stage: str, record: dict) -> Path:
    """The PNG of a record; `record["image"]` is relative to the folder of its records.jsonl.

    Raises:
        UserError: the file does not exist.
    """
    path = Path(folder) / "evaluation" / stage / record["image"]
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return path


def read_job(folder: Path) -> Job:
    """A finished run. Overrides come from `.hydra/overrides.yaml` where the folder has one.

    Raises:
        UserError: see `read_results`.
    """
    folder = Path(folder)
    results = read_results(folder / "results.json")
    settings = {key: str(results[key]) for key in ("method", "model", "reward", "seed", "steps")}
    settings["benchmark"] = str(results["benchmark"]["name"])
    overrides = folder / ".hydra" / "overrides.yaml"
    if overrides.is_file():
        for override in read_overrides(overrides):
            key, _, value = override.lstrip("+").partition("=")
            settings[key] = value
    return Job(folder, results, settings)


def read_overrides(path: Path) -> list[str]:
    """The overrides that Hydra wrote down.

    Raises:
        UserError: the file is no list of texts.
    """
    try:
        overrides = yaml.safe_load(read_text(path)) or []
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise UserError(f"{path}: expected a list of overrides")
    return overrides


def read_jobs(sweep: Path) -> list[Job]:
    """Every finished run below `sweep`, by folder name.

    Raises:
        UserError: there is none, or one is unreadable.
    """
    folders = sorted(path.parent for path in Path(sweep).rglob("results.json"))
    if not folders:
        raise UserError(f"{sweep} holds no results.json: no job finished, or this is not a sweep folder")
    return [read_job(folder) for folder in folders]
