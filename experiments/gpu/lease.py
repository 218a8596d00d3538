"""The open items, one after another, within the minutes that there are."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.gpu.bounded import Log, run_bounded
from experiments.gpu.items import Item
from experiments.gpu.record import Results
from experiments.gpu.terms import CUT
from t2i_rl.core.files import read_json, write_atomic

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 15.0  # seconds at the end for what has to be ended and written
DONE, CUT_SHORT, FAILED, NOT_BEGUN, BEFORE = "done", "cut by the clock", "failed", "not begun", "done before"
TRIED = "ran through, which a trial does not count as done"


@dataclass
class Lease:
    """What there is to run on, and for how long.

    Args:
        out: the folder that everything goes to. home: the folder of done.json and of results/, read and not written.
        sizes: `real`, or `tiny` for a trial, whose items never count as done.
        again: names of items that are done, or begun, and shall be measured from the start.
    """

    minutes: float
    out: Path
    home: Path
    device: str
    device_name: str
    commit: str
    command: str
    sizes: str = "real"
    again: Sequence[str] = ()

    def run(self, items: Sequence[Item]) -> dict[str, str]:
        """What came of each item: one of the words above."""
        end = time.monotonic() + 60 * self.minutes - MARGIN
        self.out.mkdir(parents=True, exist_ok=True)
        done = {} if self.sizes != "real" else done_of(self.home)
        outcomes = {item.name: BEFORE for item in items if item.name in done and item.name not in self.again}
        results = self._begun_before(item.name for item in items if item.name not in outcomes)
        for item in items:
            if item.name in outcomes:
                continue
            left = end - time.monotonic()
            if left < item.least:
                outcomes[item.name] = f"{NOT_BEGUN}: {max(left, 0):.0f} s were left, and it takes {item.least} at least"
            else:
                outcomes[item.name], seconds = self._run(item, min(left, item.most))
                results = Results(self.out / "results.json")
                self._add_seconds(results, item, seconds)
                if outcomes[item.name] == DONE:
                    done[item.name] = self._entry(item, results)
                    write_atomic(self.out / "done.json", json.dumps(done, indent=1) + "\n")
            print(f"{item.name}: {outcomes[item.name]}", flush=True)
            write_atomic(self.out / "tables.md", tables(items, results, outcomes))
        return outcomes

    def _begun_before(self, names) -> Results:
        """The results that earlier leases left of items that are still open."""
        results = Results(self.out / "results.json")
        results.content["sizes"] = self.sizes
        for name in names:
            kept = self.home / "results" / f"{name}.json"
            if self.sizes == "real" and kept.exists() and name not in self.again:
                results.items[name] = read_json(kept)
        results.write()
        return results

    def _run(self, item: Item, seconds: float) -> tuple[str, float]:
        """One item in a process of its own: what came of it, and the seconds it took."""
        print(f"{item.name}: {item.what}; {seconds:.0f} s at most", flush=True)
        log, started = Log(self.out / "log.txt"), time.monotonic()
        with log.path.open("a") as file:
            file.write(f"\n===== {item.name}, {time.strftime('%H:%M:%S')}\n")
        terms = {"out": self.out, "seconds": seconds, "sizes": self.sizes, "device": self.device}
        terms["device-name"] = self.device_name
        options = [text for name, value in terms.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-u", "-m", "experiments.gpu.item", item.name, item.target, *options]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        code = run_bounded(command, seconds, log, ROOT, {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})
        if code not in (0, CUT, None):
            print(log.last_lines(15), flush=True)
        whole = DONE if self.sizes == "real" else TRIED
        outcome = {0: whole, CUT: CUT_SHORT, None: CUT_SHORT}.get(code, f"{FAILED}: exit code {code}, see log.txt")
        return outcome, time.monotonic() - started

    @staticmethod
    def _add_seconds(results: Results, item: Item, seconds: float) -> None:
        if item.name in results.items:  # else it ended before it had measured anything
            results.items[item.name]["seconds"] += seconds
            results.write()

    def _entry(self, item: Item, results: Results) -> dict:
        return {
            "what": item.what,
            "when": time.strftime("%Y-%m-%d %H:%M"),
            "commit": self.commit,
            "device": self.device_name,
            "command": self.command,
            "seconds": round(results.items[item.name]["seconds"]),
        }


def done_of(home: Path) -> dict[str, dict]:
    """The items that are done, by name."""
    return read_json(home / "done.json") if (home / "done.json").exists() else {}


def tables(items: Sequence[Item], results: Results, outcomes: dict[str, str]) -> str:
    """What has been measured so far, as Markdown."""
    parts = ["# What the GPU said\n"]
    if results.sizes != "real":
        parts.append("**A trial with sizes cut: it shows that the queue runs. None of its numbers is a result.**\n")
    for item in items:
        parts.append(f"## {item.name}: {outcomes.get(item.name, 'open')}\n\n{item.what}\n")
        if item.name in results.items:
            parts.append(text_of(results.items[item.name]))
    return "\n".join(parts)


def text_of(record: dict) -> str:
    """One item's table, with where and when it was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    when = f", {record['when']}" if "when" in record else ""
    return f"{record['device']}, {versions}{when}.\n\n{record['table']}\n"
