"""The end of a multirun: one table over all jobs, one page, and the jobs that failed."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepTable(Callback):
    """Hydra callback; writes `sweep.md` and `report.html` into the sweep's folder and prints the tables."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.console import Console

        from t2i_rl.cli import failures
        from t2i_rl.evaluation.report import write_sweep_report
        from t2i_rl.evaluation.results import read_jobs, write_atomic
        from t2i_rl.evaluation.tables import sweep_tables

        folder, console = Path(config.hydra.sweep.dir), Console()
        if any(folder.rglob("results.json")):
            tables = sweep_tables(read_jobs(folder))
            for table in tables:
                console.print(table)
            write_atomic(folder / "sweep.md", "\n\n".join(table.markdown() for table in tables))
            console.print(f"report: {write_sweep_report(folder)}", soft_wrap=True)
        for name in failures:
            console.print(f"[red]failed:[/red] {name}", soft_wrap=True)
