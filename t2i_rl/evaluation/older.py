"""What runs of version 0.1 left behind, in today's form.

They had one benchmark, `shapes`. Its further columns stood in the first word of each defect, and their labels in the
tables.
"""

from typing import Any

from t2i_rl.core.contracts import Column

KINDS = {"malformed": "malformed", "over_counted": "extra", "under_counted": "missing"}
COLUMNS = (
    Column("malformed", "malformed images", more_is_better=False),
    Column("over_counted", "counting: too many", ("counting",), more_is_better=False),
    Column("under_counted", "counting: too few", ("counting",), more_is_better=False),
)
TARGET = Column("target", "target", digits=3)  # what a search over noise was about


def record_now(record: Any) -> Any:
    """A row of records.jsonl; what is none comes back as it is."""
    if not isinstance(record, dict) or "measured" in record or "defects" not in record:
        return record
    tag, judged = record.get("tag"), record.get("strict") is not None
    columns = [column for column in COLUMNS if judged and tag in (column.tasks or (tag,))]
    texts = [str(text) for text in record["defects"] or ()]
    counted = {column.name: any(text.startswith(KINDS[column.name]) for text in texts) for column in columns}
    text_is = {"text_is": "reflection"} if "says_stop" in record else {}
    return {**record, **text_is, "measured": {name: float(value) for name, value in counted.items()}}


def results_now(results: dict) -> dict:
    """The content of results.json."""
    if "columns" in results:
        return results
    return results | {"columns": {column.name: column._asdict() for column in (*COLUMNS, TARGET)}}
