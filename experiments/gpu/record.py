"""What the items have measured, in one file that is whole after every measurement."""

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from t2i_rl.core.files import read_object, write_atomic


class Results:
    """`results.json`: by item its device, versions, seconds, table, and what it has measured by name.

    Only one process writes at a time: the runner between two items, an item's own process while it runs.
    """

    def __init__(self, path: Path):
        self.path = path
        self.content = read_object(path, "sizes", "items") if path.exists() else {"sizes": "real", "items": {}}

    @property
    def sizes(self) -> str:
        return self.content["sizes"]

    @property
    def items(self) -> dict[str, dict]:
        return self.content["items"]

    def write(self) -> None:
        write_atomic(self.path, json.dumps(self.content, indent=1))


class Measured:
    """One item's part of the results. What another device measured is left out: a table is of one device."""

    def __init__(self, results: Results, item: str, device: str, table: Callable[["Measured"], str]):
        self.results, self.table = results, table
        record = results.items.get(item, {})
        if record.get("device") != device:
            record = {"device": device, "seconds": 0.0, "measured": {}, "table": ""}
        versions = {name: version(name) for name in ("torch", "transformers", "diffusers")}
        self.record = results.items[item] = record | {"versions": versions}
        self.values: dict[str, Any] = record["measured"]
        self.device = device

    def keep(self, name: str, value: Any) -> None:
        """Write a measurement down, and the table anew."""
        self.values[name] = value
        self.record["table"] = self.table(self)
        self.record["when"] = time.strftime("%Y-%m-%d %H:%M")
        self.results.write()
