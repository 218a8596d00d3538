"""Numbers with intervals as Markdown: cells, rows, tables."""

from collections.abc import Mapping, Sequence

from t2i_rl.evaluation.stats import bracket, seed_interval
from t2i_rl.evaluation.tables import excludes_zero
from t2i_rl.study.arms import STUDENT

INTERVALS = (
    "95 % intervals by a two-level bootstrap (seeds, then prompts), which understates the spread over few seeds; "
    f"`{STUDENT}`: Student's interval over seeds. Bold: excludes zero. No correction for the number of cells."
)


def difference_cell(difference: Mapping, scale: float = 100.0, digits: int = 1) -> str:
    """`+3.1 [+1.0, +5.2]`, bold where the interval excludes zero."""
    form = f"+.{digits}f"
    text = f"{scale * difference['difference']:{form}} {bracket(difference, form, scale)}"
    return f"**{text}**" if excludes_zero(difference) else text


def share_cell(shares: Sequence[float]) -> str:
    """`58.2 [54.1, 62.2]` percent: the mean of a share per seed, with Student's interval, which ends at 0 and 100."""
    interval = seed_interval(shares, (0.0, 1.0))
    return f"{100 * interval['mean']:.1f} {bracket(interval, '.1f', 100)}"


def mean_cell(values: Sequence[float], form: str = ".1f") -> str:
    """`0.649 [0.594, 0.704]`: the mean of a value per seed, with Student's interval."""
    interval = seed_interval(values)
    return f"{interval['mean']:{form}} {bracket(interval, form)}"


def metric_cells(differences: Mapping[str, Mapping], metrics: Sequence[str]) -> list[str]:
    """A cell for each metric, in points."""
    return [difference_cell(differences[metric]) for metric in metrics]


def metric_names(metrics: Sequence[str]) -> list[str]:
    """The columns' names: tasks without `task/`."""
    return [metric.removeprefix("task/") for metric in metrics]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str | None]], names: int | None = None) -> list[str]:
    """The lines of a Markdown table, and a blank one. A cell that is None is left empty.

    Args:
        names: how many columns say what a row is of. Those after them are numbers, and flush right; where it is not
            given, all columns are flush left.
    """
    left = len(head) if names is None else names
    rule = "|---" * left + "|--:" * (len(head) - left) + "|"
    lines = ["|" + "".join(" |" if cell is None else f" {cell} |" for cell in row) for row in [head, *rows]]
    return [lines[0], rule, *lines[1:], ""]
