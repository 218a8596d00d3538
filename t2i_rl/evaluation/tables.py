"""The tables of one run and of a sweep as cells of text, for the terminal (rich), for Markdown and for the report."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.records import Job, headline_comparison, stages_of
from t2i_rl.evaluation.stats import bracket, seed_interval

MISSING = "-"
MARK = " *"
NARROW_NAME = 24  # letters a line of what a row is of, in a narrow terminal
PLAIN_FORMATS = {
    "plan_length": ".1f",
    "vendi": ".2f",
    "diversity": ".3f",
    "target": ".3f",
    "text_tokens": ".1f",
    "seconds": ".2f",
}
ROW_NAMES = {
    "overall": "overall (strict)",
    "lenient": "overall (lenient)",
    "score": "partial score",
    "seen": "seen pairs",
    "held_out": "held-out pairs",
    "diversity": "diversity",
    "vendi": "Vendi score",
    "plan_length": "plan length (tokens)",
    "malformed": "malformed images",
    "over_counted": "counting: too many",
    "under_counted": "counting: too few",
}


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


def number(metric: str, value: float, signed: bool = False) -> str:
    """One value as text: accuracies and shares in percent (differences in points), others in their own unit."""
    sign = "+" if signed else ""
    if metric in PLAIN_FORMATS:
        return f"{value:{sign}z{PLAIN_FORMATS[metric]}}"
    return f"{100 * value:{sign}z.1f}"


def with_interval(metric: str, cell: dict | None, key: str) -> str:
    """`mean [low, high]`; a difference is signed, and marked when its interval excludes zero."""
    if cell is None:
        return MISSING
    signed = key == "difference"
    text = number(metric, cell[key], signed)
    if cell["low"] is None:
        return f"{text} {bracket(cell)}"
    mark = MARK if signed and excludes_zero(cell) else ""
    return f"{text} [{number(metric, cell['low'], signed)}, {number(metric, cell['high'], signed)}]{mark}"


def excludes_zero(cell: dict) -> bool:
    """Whether an interval exists, has a width (runs that all agree say nothing about their spread), and lies on one side of zero."""
    if cell["low"] is None or cell["high"] - cell["low"] <= 1e-12 * max(abs(cell["low"]), abs(cell["high"])):
        return False
    return cell["low"] > 0 or cell["high"] < 0


def metric_order(results: dict) -> list[str]:
    """Every metric of a run's stages: overall, the tasks, then the others in the order of `ROW_NAMES`."""
    names = list(dict.fromkeys(name for stage in stages_of(results) for name in results["stages"][stage]["metrics"]))
    tasks = [name for name in names if name.startswith("task/")]
    known = [name for name in ROW_NAMES if name in names]
    return [*known[:1], *tasks, *known[1:]] if "overall" in names else [*tasks, *known]


def before_after_table(results: dict) -> Table:
    """One run: a row per metric, a column per stage, and the paired comparison that the run is about (all, where nothing was trained)."""
    stages = stages_of(results)
    about = headline_comparison(results)
    comparisons = [about] if about else results["comparisons"]
    rows = []
    for name in metric_order(results):
        cells = [with_interval(name, results["stages"][stage]["metrics"].get(name), "mean") for stage in stages]
        cells += [with_interval(name, comparison["metrics"].get(name), "difference") for comparison in comparisons]
        rows.append([ROW_NAMES.get(name, name.removeprefix("task/")), *cells])
    columns = ["", *stages, *(f"{comparison['b']} - {comparison['a']}" for comparison in comparisons)]
    note = "Percent, with 95 % bootstrap intervals over prompts. Paired differences; * excludes zero."
    if any("[no interval]" in cell for row in rows for cell in row):
        note += " No interval: a task has one prompt only."
    return Table("Before and after", columns, rows, note)


def headline(results: dict) -> str:
    """The finding of a run in one or two sentences, as the numbers have it, and what went wrong on the way."""
    return " ".join([_finding(results), *(f"{line[0].upper()}{line[1:]}." for line in results.get("warnings", ()))])


def _finding(results: dict) -> str:
    if not results["stages"]:
        return f"Trained for {results['steps']} steps; nothing was evaluated (evaluation.stages=[])."
    comparison = headline_comparison(results)
    benchmark, name = results["benchmark"]["name"], headline_metric(results)
    if comparison is None or name not in comparison["metrics"]:
        parts = [
            f"{stage} {with_interval('overall', results['stages'][stage]['metrics'].get('overall'), 'mean')} %"
            for stage in stages_of(results)
        ]
        trained = any(stage.startswith("trained") for stage in results["stages"])
        lacking = "No stage of the base was drawn" if trained else "Nothing was trained"
        return f"Overall on {benchmark}: {', '.join(parts)}. {lacking}, so there is no before and after."
    cell = comparison["metrics"][name]
    means = [results["stages"][comparison[side]]["metrics"][name]["mean"] for side in "ab"]
    percent, points = ("", "") if name in PLAIN_FORMATS else (" %", " points")
    before, after = (number(name, mean) + percent for mean in means)
    basis = f"({cell['n_prompts']} prompts, paired)"
    where = benchmark if name == "overall" else f"the {name}"
    if cell["low"] is None:
        return f"Too few prompts for an interval on {where}: {before} before, {after} after, which shows nothing."
    low, high = number(name, cell["low"], True), number(name, cell["high"], True)
    difference = f"{number(name, cell['difference'], True)}{points}, 95 % interval [{low}, {high}] {basis}"
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
    if all(a.startswith("base") for a, _ in pairs):
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
    sides = [[stage for stage in stages_of(job.results) if stage.startswith(side)] for side in ("base", "trained")]
    return [*(metrics[side[-1]] if side else None for side in sides), None]


def _value_keys(columns: Sequence[str]) -> list[str]:
    return ["difference" if column == "difference" else "mean" for column in columns]


def sweep_table(jobs: Sequence[Job], metric: str = "overall") -> Table:
    """All jobs: a row per job with what differs, then what it measured in one metric."""
    settings, columns, stages = differing_settings(jobs), measured_columns(jobs), all_stages(jobs)
    compared, rows = bool(compared_stages(jobs)), []
    for job in jobs:
        names = [job.settings.get(key, MISSING) for key in settings] or [job.folder.name]
        cells = measured_cells(job, metric, compared, stages)
        texts = [with_interval(metric, cell, key) for cell, key in zip(cells, _value_keys(columns), strict=True)]
        rows.append([*names, *texts])
    note = "95 % bootstrap intervals over prompts"
    note += "; differences are paired, image by image; * excludes zero." if compared else "."
    title = f"All jobs: {ROW_NAMES.get(metric, metric)}"
    names = settings or ["job"]
    return Table(title, [*names, *columns], rows, note, names=len(names))


def seeds_table(jobs: Sequence[Job], metric: str = "overall") -> Table | None:
    """Jobs that differ only by `seed` averaged: what they measured, with Student's interval over seeds.

    Returns None where no two jobs differ only by seed. Jobs that lack one of the columns are left out of it.

    Raises:
        UserError: two jobs have the same settings and the same seed.
    """
    columns, stages = measured_columns(jobs), all_stages(jobs)
    keys = [key for key in differing_settings(jobs) if key != "seed"]
    compared = bool(compared_stages(jobs))
    groups: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    for job in jobs:
        cells = measured_cells(job, metric, compared, stages)
        if any(cell is None for cell in cells):
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
            limits = (-np.inf, np.inf) if metric in PLAIN_FORMATS else (-1.0 if key == "difference" else 0.0, 1.0)
            interval = seed_interval([cells[number][key] for cells in group.values()], limits)
            texts.append(with_interval(metric, {**interval, key: interval["mean"]}, key))
        rows.append([*(settings or ["all jobs"]), str(len(group)), *texts])
    note = (
        "Mean over seeds with Student's 95 % interval over seeds, which takes three seeds or more that do not all "
        "agree, and ends "
        "where a share does (0 and 100 %); * excludes zero."
    )
    title, names = f"Over seeds: {ROW_NAMES.get(metric, metric)}", [*(keys or ["jobs"]), "seeds"]
    return Table(title, [*names, *columns], rows, note, names=len(names))


def sweep_tables(jobs: Sequence[Job]) -> list[Table]:
    """For each metric that jobs are about, the table of all jobs and, where jobs differ only by seed, the table of means over seeds."""
    tables = []
    for metric in dict.fromkeys(headline_metric(job.results) for job in jobs):
        tables += [sweep_table(jobs, metric), seeds_table(jobs, metric)]
    return [table for table in tables if table is not None]
