"""A multirun from its first job to its last: tables over all jobs, a page, every number in one file, what failed."""

import csv
import io
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from t2i_rl.command.provenance import outcome, read_record
from t2i_rl.core import stopping
from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.records import Job, read_jobs

LAUNCH = ".sweep.json"


class Launch(NamedTuple):
    """What a job needs to know of the sweep that it is part of, wherever a launcher runs it."""

    id: str
    command: list[str]
    tracebacks: bool
    jobs: list[list[str]]  # the overrides of each; none where a sweeper chooses them as it goes


class Unfinished(NamedTuple):
    """A job without results, or whose results do not count."""

    name: str
    status: str
    error: str | None


class SweepTable(Callback):
    """Hydra callback; writes `sweep.md`, `sweep.csv` and `report.html` into the sweep's folder, prints the tables."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from t2i_rl.command.cli import failures

        unfinished = conclude(Path(config.hydra.sweep.dir))
        failures[:] = [job.name for job in unfinished]
        if stopping.asked() is not None:
            raise SystemExit(stopping.exit_code())  # Hydra swallows a callback's other exceptions


def note_launch(config: DictConfig, command: list[str], tracebacks: bool) -> None:
    """Leave in the sweep's folder what its jobs have to know: a launcher may run them on other machines."""
    given = OmegaConf.to_container(config.hydra.overrides.task)
    jobs = []
    if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # globs ask it for names
        swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        overrides = parser.parse_overrides([*swept, *given])
        jobs = BasicSweeper.split_arguments(overrides, None)[0]
    launch = Launch(secrets.token_hex(8), command, tracebacks, jobs)
    write_atomic(Path(config.hydra.sweep.dir) / LAUNCH, json.dumps(launch._asdict()))


def read_launch(folder: Path) -> Launch:
    """What `note_launch` left in a sweep's folder."""
    return Launch(**json.loads((Path(folder) / LAUNCH).read_text()))


def conclude(folder: Path) -> list[Unfinished]:
    """Print and write the tables and the page of a sweep; returns the jobs that did not finish, or never began."""
    from rich.console import Console

    from t2i_rl.evaluation.report.html import write_sweep_report
    from t2i_rl.evaluation.tables import Table, sweep_tables

    console, unfinished = Console(), unfinished_jobs(folder)
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
    return unfinished


def unfinished_jobs(folder: Path) -> list[Unfinished]:
    """The jobs of the sweep last started in `folder` that did not finish, by their own records."""
    launch, records = read_launch(folder), {}
    for path in sorted(folder.rglob("provenance.json")):
        facts = read_record(path.parent)
        if facts and facts.get("sweep") == launch.id:
            records[path.parent] = facts["overrides"]
    outcomes = [(str(job.relative_to(folder)), *outcome(job)) for job in records]
    unfinished = [Unfinished(*job) for job in outcomes if job[1] != "finished"]
    for overrides in launch.jobs:
        if not any(set(overrides) <= set(recorded) for recorded in records.values()):
            unfinished.append(Unfinished(differing(overrides, launch.jobs), "not run", None))
    return unfinished


def differing(overrides: Sequence[str], jobs: Sequence[Sequence[str]]) -> str:
    """The overrides of a job that the others do not share."""
    shared = set.intersection(*(set(job) for job in jobs))
    return ",".join(item for item in overrides if item not in shared) or ",".join(overrides)


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
