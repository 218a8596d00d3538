"""A multirun from its first job to its last: what its jobs have to know, which of them failed, what it optimises."""

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from t2i_rl.command.provenance import outcome, read_record
from t2i_rl.command.session import session
from t2i_rl.core import stopping
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import write_atomic

LAUNCH = ".sweep.json"


class Launch(NamedTuple):
    """What a job needs to know of the sweep that it is part of, wherever a launcher runs it."""

    id: str | None
    command: list[str]
    tracebacks: bool
    jobs: list[list[str]]  # the overrides of each; none where a sweeper chooses them as it goes


class Unfinished(NamedTuple):
    """A job without results, or whose results do not count."""

    name: str
    status: str
    error: str | None


class SweepTable(Callback):
    """Hydra callback; ends a sweep with its tables and its page.

    Args:
        tables: the function that makes them, by its dotted path: it stands on torch, and Hydra makes this callback for
            every command.
    """

    def __init__(self, tables: str):
        self.tables = tables

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        unfinished = conclude(Path(config.hydra.sweep.dir), self.tables)
        session.failures[:] = [job.name for job in unfinished]
        if stopping.asked() is not None:
            raise SystemExit(stopping.exit_code())  # Hydra swallows a callback's other exceptions


def note_launch(config: DictConfig) -> None:
    """Leave in the sweep's folder what its jobs have to know: a launcher may run them on other machines."""
    typed = OmegaConf.to_container(config.hydra.overrides.task)
    jobs = []
    if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # globs ask it for names
        swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        overrides = parser.parse_overrides([*swept, *typed])
        jobs = BasicSweeper.split_arguments(overrides, None)[0]
    launch = Launch(secrets.token_hex(8), session.command, session.tracebacks, jobs)
    write_atomic(Path(config.hydra.sweep.dir) / LAUNCH, json.dumps(launch._asdict()))


def read_launch(folder: Path) -> Launch:
    """What `note_launch` left in a sweep's folder."""
    return Launch(**json.loads((Path(folder) / LAUNCH).read_text()))


def conclude(folder: Path, tables: str) -> list[Unfinished]:
    """Print and write what a sweep has found; returns the jobs that did not finish, or never began.

    Args:
        tables: see `SweepTable`.
    """
    unfinished = unfinished_jobs(folder)
    get_method(tables)(folder, unfinished)
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


def optimized(results: Mapping[str, Any], name: str | None) -> float | None:
    """What a sweeper optimises: a metric of the stage that the headline is about, else of the last one.

    Args:
        results: what a task returns, the content of results.json where it writes one.
        name: `optimized_metric`; `headline` is the metric that the headline names.

    Raises:
        UserError: it was not measured.
    """
    if not results.get("stages") or name is None:
        return None
    about = results.get("headline") or {}
    stage = results["stages"][about.get("b") or list(results["stages"])[-1]]["metrics"]
    if name == "headline":
        name = about.get("metric", "overall")
    if name not in stage:
        raise UserError(f"optimized_metric={name} was not measured; choose from {', '.join(stage)}")
    return stage[name]["mean"]
