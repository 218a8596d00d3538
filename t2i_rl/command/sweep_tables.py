"""What a sweep has found: tables over all jobs, a page, every number in one file, and what failed."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from t2i_rl.command.sweep import Unfinished
from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.records import Job, read_jobs
from t2i_rl.evaluation.report.html import write_sweep_report
from t2i_rl.evaluation.tables import Table, differing_settings, sweep_tables


def write(folder: Path, unfinished: Sequence[Unfinished]) -> None:
    """Print the tables of a sweep, and write `sweep.md`, `sweep.csv` and `report.html` into its folder."""
    console = Console()
    left_out = Table(
        "Jobs that did not finish",
        ["job", "status", "why"],
        [[job.name, job.status, job.error or ""] for job in unfinished],
        "They are in no other table.",
    )
    tables = [left_out] if unfinished else []
    if any(folder.rglob("results.json")):
        jobs = read_jobs(folder)
        tables = [*sweep_tables(jobs), *tables]
        write_atomic(folder / "sweep.csv", long_csv(jobs))
    for table in tables:
        console.print(table)
    if tables:
        write_atomic(folder / "sweep.md", "\n\n".join(table.markdown() for table in tables))
        console.print(f"report: {write_sweep_report(folder, left_out if unfinished else None)}", soft_wrap=True)
    for job in unfinished:
        line = f"[red]{job.status}:[/red] {job.name}" if job.status == "not run" else f"[red]failed:[/red] {job.name}"
        console.print(line, soft_wrap=True)


def long_csv(jobs: Sequence[Job]) -> str:
    """Every number of every job, one a row.

    A row has the job, its settings that differ from other jobs', the stage or comparison (`b - a`), the metric, its
    value, interval and n.
    """
    keys = differing_settings(jobs)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["job", *keys, "of", "metric", "value", "low", "high", "n_prompts", "n_images"])
    for job in jobs:
        settings = [job.folder.name, *(job.settings.get(key, "") for key in keys)]
        measured = [(stage, "mean", content["metrics"]) for stage, content in job.results["stages"].items()]
        measured += [
            (f"{item['b']} - {item['a']}", "difference", item["metrics"]) for item in job.results["comparisons"]
        ]
        for of, value, metrics in measured:
            for name, cell in metrics.items():
                numbers = (cell[key] for key in (value, "low", "high", "n_prompts", "n_images"))
                writer.writerow([*settings, of, name, *numbers])
    return text.getvalue()
