"""From records to numbers with intervals: stratified bootstrap over prompts, paired differences, spread over seeds.

A record is one image (see docs/architecture.md). Images of one prompt are never separated: resamples draw prompts, with
replacement, within each task, as many as the task has. Intervals are 95 % percentile intervals. Where a task has one
prompt only, nothing can be resampled and the interval is None. A task where every image has the same verdict has an
interval of width zero: the bootstrap cannot see what the sample does not show. Over seeds there is no interval for
fewer than three, nor where all agree: their spread is what it would be made of.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.shapes.text import GENEVAL_TASKS

RESAMPLES = 2000
FEWEST_SEEDS = 3  # with two, Student's interval is nine times as wide as their distance, or has no width at all
TOO_FEW_SEEDS = {"low": None, "high": None, "no_interval": "too few seeds"}
NO_SPREAD = {"low": None, "high": None, "no_interval": "seeds agree"}


@dataclass(frozen=True)
class Columns:
    """Records of N images by column: prompt ids (N,), tags (N,), seen (N,) of True/False/None, values {name: (N,)}."""

    prompts: np.ndarray
    tags: np.ndarray
    seen: np.ndarray
    values: dict[str, np.ndarray]


def columns_of(records: Sequence[dict]) -> Columns:
    """The columns that metrics are made of: strict, lenient, score, malformed, over_counted (an object too many) and under_counted; plan_length unless a record has null.

    Raises:
        UserError: there is no record.
    """
    if not records:
        raise UserError("no records to evaluate")
    values = {name: np.array([float(r[name]) for r in records]) for name in ("strict", "lenient", "score")}
    kinds = {"malformed": "malformed", "over_counted": "extra", "under_counted": "missing"}
    for name, kind in kinds.items():
        values[name] = np.array([float(any(d.startswith(kind) for d in r["defects"])) for r in records])
    if all(r["plan_length"] is not None for r in records):
        values["plan_length"] = np.array([float(r["plan_length"]) for r in records])
    return Columns(
        prompts=np.array([r["prompt_id"] for r in records]),
        tags=np.array([r["tag"] for r in records]),
        seen=np.array([r.get("seen") for r in records], dtype=object),
        values=values,
    )


def paired_columns(a: Sequence[dict], b: Sequence[dict]) -> Columns:
    """Columns of `b - a`, image by image, matched by (prompt_id, sample_index); only columns that both sides have.

    Raises:
        UserError: a key occurs twice in one list, or the two lists do not have the same keys.
    """
    by_key = []
    for name, records in (("first", a), ("second", b)):
        keyed = {(r["prompt_id"], r["sample_index"]): r for r in records}
        if len(keyed) != len(records):
            raise UserError(
                f"cannot pair: the {name} list repeats {len(records) - len(keyed)} prompt and sample indices"
            )
        by_key.append(keyed)
    unmatched = by_key[0].keys() ^ by_key[1].keys()
    if unmatched:
        raise UserError(f"cannot pair: {len(unmatched)} images are in one list only, for example {min(unmatched)}")
    first = columns_of(a)
    second = columns_of([by_key[1][key] for key in by_key[0]])
    changes = {name: second.values[name] - values for name, values in first.values.items() if name in second.values}
    return Columns(first.prompts, first.tags, first.seen, changes)


def metric_rows(columns: Columns, tasks: Sequence[str]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Every metric that has images, as (name, the column it averages, mask (N,) of the images it covers)."""
    in_tasks = np.isin(columns.tags, tasks)
    everything = np.ones(len(columns.tags), bool)
    present = set(columns.tags.tolist())
    metrics = [("overall", "strict", in_tasks)]
    ordered = [task for task in tasks if task in present] + sorted(present - set(tasks))
    metrics += [(f"task/{tag}", "strict", columns.tags == tag) for tag in ordered]
    metrics += [("lenient", "lenient", in_tasks), ("score", "score", in_tasks)]
    metrics += [("seen", "strict", in_tasks & (columns.seen == True))]  # noqa: E712 - elementwise
    metrics += [("held_out", "strict", in_tasks & (columns.seen == False))]  # noqa: E712 - elementwise
    metrics += [("plan_length", "plan_length", everything), ("malformed", "malformed", everything)]
    metrics += [(name, name, columns.tags == "counting") for name in ("over_counted", "under_counted")]
    for name, column, mask in metrics:
        if column in columns.values and mask.any():
            yield name, column, mask


def bootstrap(
    values: np.ndarray, prompts: np.ndarray, strata: np.ndarray, resamples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The unweighted mean over strata of the mean over images, and its bootstrap distribution over prompts.

    Strata are taken in sorted order; for each, one `rng.integers` call draws the prompts (sorted) of all resamples.

    Args:
        values: (S, N), one row per run on the same images; all rows see the same resampled prompts.
        prompts: (N,) prompt ids.
        strata: (N,) task tags.

    Returns:
        means (S,), and draws (S, resamples): NaN where a stratum has a single prompt.
    """
    means, draws = np.zeros(len(values)), np.zeros((len(values), resamples))
    names = np.unique(strata)
    for name in names:
        rows = strata == name
        _, index, counts = np.unique(prompts[rows], return_inverse=True, return_counts=True)
        picks = rng.integers(0, len(counts), (resamples, len(counts)))
        images = counts[picks].sum(axis=1)
        for run, row in enumerate(values[:, rows]):
            sums = np.bincount(index, weights=row)
            means[run] += row.mean() / len(names)
            draws[run] += sums[picks].sum(axis=1) / images / len(names) if len(counts) > 1 else np.nan
    return means, draws


def percentile_interval(draws: np.ndarray) -> dict:
    """`low` and `high` of the central 95 % of draws (R,); None where the draws are undefined."""
    if np.isnan(draws).any():
        return {"low": None, "high": None}
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def two_sided_p(draws: np.ndarray) -> float | None:
    """Bootstrap p-value of "the difference is zero": twice the smaller tail of draws (R,), never below 2 / (R + 1)."""
    if np.isnan(draws).any():
        return None
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(draws) + 1)))


def counts_of(name: str, columns: Columns, mask: np.ndarray, tasks: Sequence[str]) -> dict:
    """How many prompts and images a metric rests on; for `overall`, also which tasks."""
    counts = {"n_prompts": len(np.unique(columns.prompts[mask])), "n_images": int(mask.sum())}
    if name == "overall":
        counts["tasks"] = [task for task in tasks if task in columns.tags]
    return counts


def bootstrap_metrics(
    runs: Sequence[Columns], tasks: Sequence[str], resamples: int, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, dict]]:
    """(name, means (S,), draws (S, R), counts) of every metric of S runs on the same images; one generator each."""
    first = runs[0]
    for name, column, mask in metric_rows(first, tasks):
        if any(column not in run.values for run in runs):
            continue
        values = np.stack([run.values[column][mask] for run in runs])
        rng = np.random.default_rng(seed)
        means, draws = bootstrap(values, first.prompts[mask], first.tags[mask], resamples, rng)
        yield name, means, draws, counts_of(name, first, mask, tasks)


def aggregate(
    records: Sequence[dict], tasks: Sequence[str] = GENEVAL_TASKS, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict]:
    """The metrics of one stage, as in results.json: `{name: {mean, low, high, n_prompts, n_images}}`.

    `overall`, `lenient`, `score`, `seen` and `held_out` are unweighted means over those of `tasks` that are present
    (`overall` lists them under `tasks`); `plan_length` (tokens) and `malformed` (share of images) over all tags.
    Tags outside `tasks` are reported as `task/<tag>` only.

    Raises:
        UserError: there is no record.
    """
    metrics = bootstrap_metrics([columns_of(records)], tasks, resamples, seed)
    return {name: {"mean": float(m[0]), **percentile_interval(d[0]), **counts} for name, m, d, counts in metrics}


def compare(
    a: Sequence[dict],
    b: Sequence[dict],
    tasks: Sequence[str] = GENEVAL_TASKS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict]:
    """Paired difference `b - a` of every metric: `{name: {difference, low, high, p_value, n_prompts, n_images}}`.

    Raises:
        UserError: the two lists do not hold the same (prompt_id, sample_index) keys, once each.
    """
    metrics = bootstrap_metrics([paired_columns(a, b)], tasks, resamples, seed)
    return {
        name: {"difference": float(m[0]), **percentile_interval(d[0]), "p_value": two_sided_p(d[0]), **counts}
        for name, m, d, counts in metrics
    }


def compare_over_seeds(
    pairs: Sequence[tuple[Sequence[dict], Sequence[dict]]],
    tasks: Sequence[str] = GENEVAL_TASKS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict]:
    """Mean over runs of the paired difference, with a two-level bootstrap: each resample draws runs, then prompts.

    All runs are evaluated on the same prompts, so one resample of the prompts serves all runs that it draws. With few
    runs the spread between runs is understated (by (S - 1) / S in variance): report `seed_interval` beside it. Fewer
    than `FEWEST_SEEDS` runs have no interval.

    Args:
        pairs: one (before, after) pair of record lists per seed.

    Returns:
        `{name: {difference, low, high, p_value, n_prompts, n_images, n_seeds}}`; without an interval `low`, `high` and
        `p_value` are None, and `no_interval` says why.

    Raises:
        UserError: a pair does not match, or the runs are not on the same images.
    """
    runs = [paired_columns(*pair) for pair in pairs]
    keys = [[(r["prompt_id"], r["sample_index"]) for r in before] for before, _ in pairs]
    if any(other != keys[0] for other in keys):
        raise UserError("cannot average over seeds: the runs were not evaluated on the same images in the same order")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(runs), (resamples, len(runs)))
    table = {}
    for name, means, draws, counts in bootstrap_metrics(runs, tasks, resamples, seed + 1):
        averaged = draws[picks, np.arange(resamples)[:, None]].mean(axis=1)
        enough = len(runs) >= FEWEST_SEEDS
        interval = percentile_interval(averaged) if enough else TOO_FEW_SEEDS
        change = {"difference": float(means.mean()), **interval, "p_value": two_sided_p(averaged) if enough else None}
        table[name] = {**change, **counts, "n_seeds": len(runs)}
    return table


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by integrating its density in the angle atan(t / sqrt(degrees))."""
    angle = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(degrees) * np.tan(np.interp(0.95 * mass[-1], mass, angle)))


def seed_interval(values: Sequence[float], limits: tuple[float, float] = (-np.inf, np.inf)) -> dict:
    """Mean over seeds with Student's 95 % interval: `{mean, low, high, n}`.

    Without an interval `low` and `high` are None and `no_interval` says why: fewer than `FEWEST_SEEDS` seeds, or seeds
    that all agree (but for rounding), from which no spread can be told.

    Args:
        limits: between which the truth must lie, as a share does between 0 and 1. The interval ends there: Student's
            reaches beyond where few seeds differ much, and since the truth is never out there, what remains holds it
            exactly as often as the whole did.

    Raises:
        UserError: there is no value.
    """
    if len(values) == 0:
        raise UserError("no runs to average over seeds")
    mean, n = float(np.mean(values)), len(values)
    if n < FEWEST_SEEDS:
        return {"mean": mean, **TOO_FEW_SEEDS, "n": n}
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        return {"mean": mean, **NO_SPREAD, "n": n}
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5
    return {"mean": mean, "low": max(mean - half, limits[0]), "high": min(mean + half, limits[1]), "n": n}


def bracket(cell: dict, form: str = ".1f", scale: float = 1.0) -> str:
    """`[low, high]` of a cell, each `scale` times in this format; or why there is no interval."""
    if cell["low"] is None:
        return f"[{cell.get('no_interval', 'no interval')}]"
    return f"[{scale * cell['low']:{form}}, {scale * cell['high']:{form}}]"
