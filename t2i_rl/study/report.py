"""A study as a command and as a page: what `python my_study.py` does, and the table that it writes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import replacing, write_atomic
from t2i_rl.study.arms import STUDENT, Study
from t2i_rl.study.jobs import commits_of, require_done
from t2i_rl.study.tables import INTERVALS, markdown, metric_cells, metric_names


def run_study(study: Study, table: Path, title: str) -> None:
    """Run what is not done and write the table, as the command line says.

    Args:
        table: the Markdown file to write.
        title: the page's first line, and what `--help` says.
    """
    parser = study_parser(title)
    parser.add_argument("--arms", nargs="+", choices=list(study.arms), help="these alone; prints their rows")

    def main() -> None:
        options = parser.parse_args()
        if not options.only_table:
            study.run(options.workers, options.arms)
        if options.arms:
            require_done(study.jobs(options.arms))
            print("\n".join(difference_tables(study, options.arms)))
        else:
            write_atomic(table, page(study, title))
            print(f"wrote {table}")

    in_one_line(main)


def study_parser(description: str) -> argparse.ArgumentParser:
    """The options that every study's command has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild tables and figures from finished jobs")
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side, one thread each")
    return parser


def in_one_line(main: Callable[[], None]) -> None:
    """Call a command; what the user can mend ends it with one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def save_figure(figure, path: Path) -> None:
    """Write a figure of matplotlib as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    print(f"wrote {path}")


def page(study: Study, title: str) -> str:
    """What every arm changed, and how much of that is due to more than the control.

    Raises:
        UserError: a job is not done, or stale.
    """
    jobs = study.jobs()
    require_done(jobs)
    rows = study.records(next(iter(study.arms)), study.trained)[0]
    seeds, prompts = ", ".join(map(str, study.seeds)), len({row["prompt_id"] for row in rows})
    about = (
        f"{len(study.arms)} arms x {len(study.seeds)} seeds ({seeds}) at {' and '.join(commits_of(jobs))}; {prompts} "
        f"prompts, {len(rows)} images a stage; strict accuracy, in points."
    )
    return "\n".join([f"# {title.splitlines()[0]}", "", about, "", INTERVALS, "", *difference_tables(study)])


def difference_tables(study: Study, arms: Sequence[str] | None = None) -> list[str]:
    """Lines: a table against the base and one against the control, of these arms (all, where none is named)."""
    arms = list(arms or study.arms)
    lines = []
    if study.base is not None:
        changes = {arm: study.against_base(arm) for arm in arms}
        lines += ["## Trained minus base", "", *difference_table(changes)]
    others = [arm for arm in arms if arm != study.control]
    if study.control is not None and others:
        changes = {arm: study.against(study.control, arm) for arm in others}
        lines += [f"## Trained minus `{study.control}` (same seeds, same prompts)", "", *difference_table(changes)]
    return lines


def difference_table(changes: dict[str, dict[str, dict]]) -> list[str]:
    """A row per arm: overall by both intervals, then the tasks."""
    tasks = [metric for metric in next(iter(changes.values())) if metric.startswith("task/")]
    metrics = ["overall", STUDENT, *tasks]
    rows = [[arm, *metric_cells(differences, metrics)] for arm, differences in changes.items()]
    return markdown(["arm", *metric_names(metrics)], rows)
