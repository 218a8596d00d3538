"""The tables of one run and of a sweep as cells of text, for the terminal (rich), for Markdown and for the report."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from t2i_rl.core.contracts import Column
from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.records import Job, headline_comparison, stages_of
from t2i_rl.evaluation.stage import SIDES, Stage
from t2i_rl.evaluation.stats import bracket, seed_interval

MISSING = "-"
MARK = " *"
NARROW_NAME = 24  # letters a line of what a row is of, in a narrow terminal
COMMON = (  # metrics that every benchmark has, or none names
    Column("overall", "overall (strict)"),
    Column("lenient", "overall (lenient)"),
    Column("score", "partial score"),
    Column("seen", "seen pairs"),
    Column("held_out", "held-out pairs"),
    Column("diversity", "diversity", digits=3),
    Column("vendi", "Vendi score", digits=2),
    Column("plan_length", "plan length (tokens)", digits=1),
)


@dataclass(frozen=True)
class Table:
    """A table of text: a title, column names, rows of as many cells, and a note that says how to read it.

    The first `names` columns say what a row is of.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str
    names: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For the terminal: real differences in bold. In a narrow one intervals stand on lines of their own; where that
        is not enough, columns are spread over several tables rather than cut."""

        def fits(table: Table, bracket: str) -> bool:
            unwrapped = console.measure(table.rich(bracket), options=options.update(max_width=1000)).maximum
            return unwrapped <= options.max_width

        if fits(self, " ["):
            yield self.rich(" [")
            return
        groups: list[list[int]] = [[]]
        for number in range(self.names, len(self.columns)):
            if groups[-1] and not fits(self.part([*groups[-1], number]), "\n["):
                groups.append([])
            groups[-1].append(number)
        for place, group in enumerate(groups):
            title = self.title if place == 0 else f"{self.title} (continued)"
            note = self.note if place == len(groups) - 1 else ""
            yield replace(self.part(group), title=title, note=note).rich("\n[")

    def part(self, numbers: Sequence[int]) -> "Table":
        """The table with its names and the columns of these numbers."""
        chosen = [*range(self.names), *numbers]
        rows = [[row[number] for number in chosen] for row in self.rows]
        return replace(self, columns=[self.columns[number] for number in chosen], rows=rows)

    def rich(self, bracket: str) -> RichTable:
        """The table with `bracket` between a value and its interval."""
        narrow = bracket.startswith("\n")
        table = RichTable(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for number, column in enumerate(self.columns):
            header = column.replace(" - ", "\n- ") if narrow else column
            table.add_column(Text(header), justify="left" if number == 0 else "right")
        for row in self.rows:
            row = [textwrap.fill(row[0], NARROW_NAME), *row[1:]] if narrow else row
            cells = [Text(cell.replace(" [", bracket), style="bold" if cell.endswith(MARK) else "") for cell in row]
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """The table as GitHub Markdown, with the title above and the note below."""
        header = ["---", *("--:" for _ in self.columns[1:])]
        rows = [self.columns, header, *self.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.note, ""])


def number(column: Column, value: float, signed: bool = False) -> str:
    """One value as text: shares in percent (differences in points), others with the digits that their column says."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}z.1f}" if column.digits is None else f"{value:{sign}z.{column.digits}f}"


def with_interval(column: Column, cell: dict | None, key: str) -> str:
    """`mean [low, high]`; a difference is signed, and marked when its interval excludes zero."""
    if cell is None:
        return MISSING
    signed = key == "difference"
    text = number(column, cell[key], signed)
    if cell["low"] is None:
        return f"{text} {bracket(cell)}"
    mark = MARK if signed and excludes_zero(cell) else ""
    return f"{text} [{number(column, cell['low'], signed)}, {number(column, cell['high'], signed)}]{mark}"


def excludes_zero(cell: dict) -> bool:
    """Whether an interval exists, has a width (runs that all agree say nothing about their spread), and lies on one
    side of zero."""
    if cell["low"] is None or cell["high"] - cell["low"] <= 1e-12 * max(abs(cell["low"]), abs(cell["high"])):
        return False
    return cell["low"] > 0 or cell["high"] < 0


@dataclass(frozen=True)
class Selection:
    """Which of a run's numbers stand in a table of their own; results.json keeps it, so that a page can be written from
    the disk alone.

    columns: the metrics, a row each; empty for those of the table of before and after.
    stages: stages whose means are shown. pairs: `(a, b)` of comparisons whose differences are shown.
    """

    title: str
    note: str
    columns: Sequence[Column] = ()
    stages: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()

    def written(self) -> dict:
        """As results.json has it."""
        return {**vars(self), "columns": [row_of(column) for column in self.columns]}

    @classmethod
    def read(cls, content: dict) -> "Selection":
        """What `written` gave."""
        columns = [column_of(row) for row in content["columns"]]
        pairs = [(a, b) for a, b in content["pairs"]]
        return cls(content["title"], content["note"], columns, content["stages"], pairs)


def row_of(column: Column) -> dict:
    """A column as results.json has it, never without a label."""
    return column._replace(label=column.label or column.name)._asdict()


def column_of(row: dict) -> Column:
    """What tables need of a column, from results.json."""
    return Column(row["name"], row["label"], digits=row["digits"])


def described(results: dict, metric: str) -> Column:
    """What results.json says of a metric; a task's is called by the task."""
    rows = list(results.get("columns", {}).values())
    rows += [row for table in results.get("tables", ()) for row in table["columns"]]
    named = {column.name: column for column in (*COMMON, *map(column_of, rows))}
    return named.get(metric, Column(metric, metric.removeprefix("task/")))


def metric_order(results: dict) -> list[str]:
    """Every metric of a run's stages that its benchmark measures: overall, the tasks, then the others."""
    names = dict.fromkeys(name for stage in stages_of(results) for name in results["stages"][stage]["metrics"])
    tasks = [name for name in names if name.startswith("task/")]
    known = [name for name in (*(column.name for column in COMMON), *results.get("columns", {})) if name in names]
    return [*known[:1], *tasks, *known[1:]] if "overall" in names else [*tasks, *known]


def selected_table(results: dict, selection: Selection) -> Table:
    """A row a metric that any of the columns has: stages, then comparisons."""
    metrics = [results["stages"][stage]["metrics"] for stage in selection.stages]
    compared = {(comparison["a"], comparison["b"]): comparison["metrics"] for comparison in results["comparisons"]}
    changes = [compared[pair] for pair in selection.pairs]
    rows = []
    for column in selection.columns or [described(results, name) for name in metric_order(results)]:
        if not any(column.name in cells for cells in (*metrics, *changes)):
            continue
        means = [with_interval(column, cells.get(column.name), "mean") for cells in metrics]
        differences = [with_interval(column, cells.get(column.name), "difference") for cells in changes]
        rows.append([column.label or column.name, *means, *differences])
    columns = ["", *selection.stages, *(f"{b} - {a}" for a, b in selection.pairs)]
    return Table(selection.title, columns, rows, selection.note)


def before_after_table(results: dict) -> Table:
    """One run: a row per metric, a column per stage, and the paired comparison that the run is about (all, where
    nothing was trained)."""
    about = headline_comparison(results)
    comparisons = [about] if about else results["comparisons"]
    pairs = [(comparison["a"], comparison["b"]) for comparison in comparisons]
    note = "Percent, with 95 % bootstrap intervals over prompts. Paired differences; * excludes zero."
    table = selected_table(results, Selection("Before and after", note, stages=stages_of(results), pairs=pairs))
    if any("[no interval]" in cell for row in table.rows for cell in row):
        return replace(table, note=f"{note} No interval: a task has one prompt only.")
    return table


def run_tables(results: dict) -> list[Table]:
    """The tables of a run: before and after, then those that its method asks for."""
    own = [selected_table(results, Selection.read(content)) for content in results.get("tables", ())]
    return [before_after_table(results), *own]


def headline(results: dict) -> str:
    """The finding of a run in one or two sentences, as the numbers have it, and what went wrong on the way."""
    return " ".join([_finding(results), *(f"{line[0].upper()}{line[1:]}." for line in results.get("warnings", ()))])


def _finding(results: dict) -> str:
    if not results["stages"]:
        return f"Trained for {results['steps']} steps; nothing was evaluated (evaluation.stages=[])."
    comparison = headline_comparison(results)
    benchmark, name = results["benchmark"]["name"], headline_metric(results)
    if comparison is None or name not in comparison["metrics"]:
        overall, stages = described(results, "overall"), results["stages"]
        parts = [
            f"{stage} {with_interval(overall, stages[stage]['metrics'].get('overall'), 'mean')} %"
            for stage in stages_of(results)
        ]
        trained = any(Stage.parse(stage).side == "trained" for stage in stages)
        lacking = "No stage of the base was drawn" if trained else "Nothing was trained"
        return f"Overall on {benchmark}: {', '.join(parts)}. {lacking}, so there is no before and after."
    cell, column = comparison["metrics"][name], described(results, name)
    means = [results["stages"][comparison[side]]["metrics"][name]["mean"] for side in "ab"]
    percent, points = (" %", " points") if column.digits is None else ("", "")
    before, after = (number(column, mean) + percent for mean in means)
    basis = f"({cell['n_prompts']} prompts, paired)"
    where = benchmark if name == "overall" else f"the {name}"
    if cell["low"] is None:
        return f"Too few prompts for an interval on {where}: {before} before, {after} after, which shows nothing."
    low, high = number(column, cell["low"], True), number(column, cell["high"], True)
    difference = f"{number(column, cell['difference'], True)}{points}, 95 % interval [{low}, {high}] {basis}"
    if not excludes_zero(cell):
        return f"No measurable change on {where}: {before} before, {after} after; {difference}: includes zero."
    verb = "rose" if cell["difference"] > 0 else "fell"
    subject = f"Overall on {benchmark}" if name == "overall" else f"The {name}"
    return f"{subject} {verb} from {before} to {after}: {difference}."


def headline_metric(results: dict) -> str:
    """The metric a run is about: `overall`, or what its headline names."""
    return (results["headline"] or {}).get("metric", "overall")


def differing_settings(jobs: Sequence[Job]) -> list[str]:
    """The settings in which jobs differ, in the order in which jobs first name them; `seed` last."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    differing = [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]
    return sorted(differing, key=lambda key: key == "seed")


def compared_stages(jobs: Sequence[Job]) -> list[str]:
    """The names of the two stages that jobs compare; none where no job has a before and after."""
    pairs = {(pair["a"], pair["b"]) for pair in map(headline_comparison, (job.results for job in jobs)) if pair}
    if not pairs:
        return []
    if all(Stage.parse(a).side == "base" for a, _ in pairs):
        return ["base", "trained"]
    return list(*pairs) if len(pairs) == 1 else ["before", "after"]


def all_stages(jobs: Sequence[Job]) -> list[str]:
    """Every stage that a job has, each once."""
    return list(dict.fromkeys(stage for job in jobs for stage in stages_of(job.results)))


def measured_columns(jobs: Sequence[Job]) -> list[str]:
    """What a table over jobs shows of one metric: before, after and their difference; every stage, where nothing was
    compared."""
    compared = compared_stages(jobs)
    return [*compared, "difference"] if compared else all_stages(jobs)


def measured_cells(job: Job, metric: str, compared: bool, stages: Sequence[str]) -> list[dict | None]:
    """A job's cells in the columns of `measured_columns`; None where it does not have one.

    A job without a comparison stands among compared ones with what it did measure: its last stage of the base, and of
    what was trained.
    """
    metrics = {stage: content["metrics"].get(metric) for stage, content in job.results["stages"].items()}
    if not compared:
        return [metrics.get(stage) for stage in stages]
    comparison = headline_comparison(job.results)
    if comparison is not None:
        return [metrics[comparison["a"]], metrics[comparison["b"]], comparison["metrics"].get(metric)]
    stages = stages_of(job.results)
    sides = [[stage for stage in stages if Stage.parse(stage).side == side] for side in SIDES]
    return [*(metrics[side[-1]] if side else None for side in sides), None]


def described_among(jobs: Sequence[Job], metric: str) -> Column:
    """What the first job that measured a metric says of it."""
    measuring = (job.results for job in jobs if any(metric in s["metrics"] for s in job.results["stages"].values()))
    return described(next(measuring, jobs[0].results), metric)


def _value_keys(columns: Sequence[str]) -> list[str]:
    return ["difference" if column == "difference" else "mean" for column in columns]


def sweep_table(jobs: Sequence[Job], metric: str = "overall") -> Table:
    """All jobs: a row per job with what differs, then what it measured in one metric."""
    settings, columns, stages = differing_settings(jobs), measured_columns(jobs), all_stages(jobs)
    shown, compared, rows = described_among(jobs, metric), bool(compared_stages(jobs)), []
    for job in jobs:
        names = [job.settings.get(key, MISSING) for key in settings] or [job.folder.name]
        cells = measured_cells(job, metric, compared, stages)
        texts = [with_interval(shown, cell, key) for cell, key in zip(cells, _value_keys(columns), strict=True)]
        rows.append([*names, *texts])
    note = "95 % bootstrap intervals over prompts"
    note += "; differences are paired, image by image; * excludes zero." if compared else "."
    title = f"All jobs: {shown.label}"
    names = settings or ["job"]
    return Table(title, [*names, *columns], rows, note, names=len(names))


def seeds_table(jobs: Sequence[Job], metric: str = "overall") -> Table | None:
    """Jobs that differ only by `seed` averaged: what they measured, with Student's interval over seeds.

    Returns None where no two jobs differ only by seed. Jobs that lack one of the columns are left out of it.

    Raises:
        UserError: two jobs have the same settings and the same seed.
    """
    columns, stages, shown = measured_columns(jobs), all_stages(jobs), described_among(jobs, metric)
    keys = [key for key in differing_settings(jobs) if key != "seed"]
    compared = bool(compared_stages(jobs))
    groups: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    for job in jobs:
        cells = [cell for cell in measured_cells(job, metric, compared, stages) if cell is not None]
        if len(cells) < len(columns):
            continue
        group = groups.setdefault(tuple(job.settings.get(key, MISSING) for key in keys), {})
        if job.settings["seed"] in group:
            raise UserError(f"{job.folder} repeats another job's settings and seed; average distinct runs only")
        group[job.settings["seed"]] = cells
    if all(len(group) < 2 for group in groups.values()):
        return None
    rows = []
    for settings, group in groups.items():
        texts = []
        for number, key in enumerate(_value_keys(columns)):
            of_shares = (-1.0 if key == "difference" else 0.0, 1.0)
            limits = of_shares if shown.digits is None else (-np.inf, np.inf)
            interval = seed_interval([cells[number][key] for cells in group.values()], limits)
            texts.append(with_interval(shown, {**interval, key: interval["mean"]}, key))
        rows.append([*(settings or ["all jobs"]), str(len(group)), *texts])
    note = (
        "Mean over seeds with Student's 95 % interval over seeds, which takes three seeds or more that do not all "
        "agree, and ends where a share does (0 and 100 %); * excludes zero."
    )
    title, names = f"Over seeds: {shown.label}", [*(keys or ["jobs"]), "seeds"]
    return Table(title, [*names, *columns], rows, note, names=len(names))


def sweep_tables(jobs: Sequence[Job]) -> list[Table]:
    """For each metric that jobs are about, the table of all jobs and, where jobs differ only by seed, the table of
    means over seeds."""
    tables = []
    for metric in dict.fromkeys(headline_metric(job.results) for job in jobs):
        tables += [sweep_table(jobs, metric), seeds_table(jobs, metric)]
    return [table for table in tables if table is not None]
