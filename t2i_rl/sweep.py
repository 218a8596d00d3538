"""The end of a multirun: one table over all jobs, one page, every number in one file, and the jobs that failed."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from t2i_rl.evaluation.results import Job, read_jobs, write_atomic


class SweepTable(Callback):
    """Hydra callback; writes `sweep.md`, `sweep.csv` and `report.html` into the sweep's folder and prints the tables."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.console import Console

        from t2i_rl.cli import failures
        from t2i_rl.evaluation.report import write_sweep_report
        from t2i_rl.evaluation.tables import sweep_tables

        folder, console = Path(config.hydra.sweep.dir), Console()
        if any(folder.rglob("results.json")):
            jobs = read_jobs(folder)
            tables = sweep_tables(jobs)
            for table in tables:
                console.print(table)
            write_atomic(folder / "sweep.md", "\n\n".join(table.markdown() for table in tables))
            write_atomic(folder / "sweep.csv", long_csv(jobs))
            console.print(f"report: {write_sweep_report(folder)}", soft_wrap=True)
        for name in failures:
            console.print(f"[red]failed:[/red] {name}", soft_wrap=True)


def long_csv(jobs: Sequence[Job]) -> str:
    """Every number of every job, one a row: job, its settings that differ, stage or comparison (`b - a`), metric, value, interval, n."""
    from t2i_rl.evaluation.tables import differing_settings

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
                writer.writerow(
                    [*settings, of, name, *(cell[key] for key in (value, "low", "high", "n_prompts", "n_images"))]
                )
    return text.getvalue()
