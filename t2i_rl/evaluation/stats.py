"""From records to numbers with intervals: stratified bootstrap over prompts, paired differences, spread over seeds.

Four intervals, each defined once, by what it lets vary:

- `bootstrap` with `percentile_interval` (`aggregate`, `compare`, `compare_values`): the prompts; the runs stay.
- `two_level_interval` (`compare_over_seeds`, `compare_values_over_seeds`): the seeds, then the prompts.
- `seed_interval` (`seed_difference`): the seeds, by Student's t; the prompts stay.
- `wilson`: a share of independent cases.

A record is one image (see docs/architecture.md). Images of one prompt are never separated: resamples draw prompts, with
replacement, within each task, as many as the task has. Intervals are 95 % percentile intervals. Where a task has one
prompt only, nothing can be resampled and the interval is None. A task where every image has the same verdict has an
interval of width zero: the bootstrap cannot see what the sample does not show. Over seeds there is no interval for
fewer than three, nor where all agree: their spread is what it would be made of.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2i_rl.core.errors import UserError

RESAMPLES = 2000
ALWAYS = ("strict", "lenient", "score", "plan_length")  # columns that no benchmark names
FEWEST_SEEDS = 3  # with two, Student's interval is nine times as wide as their distance, or has no width at all
TOO_FEW_SEEDS = {"low": None, "high": None, "no_interval": "too few seeds"}
NO_SPREAD = {"low": None, "high": None, "no_interval": "seeds agree"}


@dataclass(frozen=True)
class Columns:
    """Records of N images by column: prompt ids (N,), tags (N,), seen (N,) of True/False/None, values {name: (N,)}.

    A value is NaN where the benchmark measured nothing of that image.
    """

    prompts: np.ndarray
    tags: np.ndarray
    seen: np.ndarray
    values: dict[str, np.ndarray]


def columns_of(records: Sequence[dict]) -> Columns:
    """The columns that metrics are made of: strict, lenient, score, whatever the benchmark measured beside them, and
    plan_length unless a record has null.

    Raises:
        UserError: there is no record.
    """
    if not records:
        raise UserError("no records to evaluate")
    values = {name: np.array([float(r[name]) for r in records]) for name in ("strict", "lenient", "score")}
    for name in dict.fromkeys(name for r in records for name in r["measured"]):
        values[name] = np.array([r["measured"].get(name, np.nan) for r in records])
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
    metrics += [("plan_length", "plan_length", everything)]
    measured = [name for name in columns.values if name not in ALWAYS]
    metrics += [(name, name, ~np.isnan(columns.values[name])) for name in measured]
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
    counts: dict[str, Any] = {"n_prompts": len(np.unique(columns.prompts[mask])), "n_images": int(mask.sum())}
    if name == "overall":
        counts["tasks"] = [task for task in tasks if task in columns.tags]
    return counts


def bootstrap_metrics(
    runs: Sequence[Columns], tasks: Sequence[str] | None, resamples: int, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, dict]]:
    """(name, means (S,), draws (S, R), counts) of every metric of S runs on the same images; one generator each."""
    first = runs[0]
    tasks = sorted(set(first.tags.tolist())) if tasks is None else tasks
    for name, column, mask in metric_rows(first, tasks):
        if any(column not in run.values for run in runs):
            continue
        mask = mask & ~np.isnan([run.values[column] for run in runs]).any(axis=0)  # what every run has measured
        if not mask.any():
            continue
        values = np.stack([run.values[column][mask] for run in runs])
        rng = np.random.default_rng(seed)
        means, draws = bootstrap(values, first.prompts[mask], first.tags[mask], resamples, rng)
        yield name, means, draws, counts_of(name, first, mask, tasks)


def aggregate(
    records: Sequence[dict], tasks: Sequence[str] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict]:
    """The metrics of one stage, as in results.json: `{name: {mean, low, high, n_prompts, n_images}}`.

    `overall`, `lenient`, `score`, `seen` and `held_out` are unweighted means over those of `tasks` that are present
    (`overall` lists them under `tasks`; None takes every tag); `plan_length` (tokens) and what the benchmark measured
    beside its verdicts over all tags that have them. Tags outside `tasks` are reported as `task/<tag>` only.

    Raises:
        UserError: there is no record.
    """
    metrics = bootstrap_metrics([columns_of(records)], tasks, resamples, seed)
    return {name: {"mean": float(m[0]), **percentile_interval(d[0]), **counts} for name, m, d, counts in metrics}


def compare(
    a: Sequence[dict],
    b: Sequence[dict],
    tasks: Sequence[str] | None = None,
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
    tasks: Sequence[str] | None = None,
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
    table = {}
    for name, means, draws, counts in bootstrap_metrics(runs, tasks, resamples, seed + 1):
        interval = two_level_interval(draws, np.random.default_rng(seed))
        table[name] = {"difference": float(means.mean()), **interval, **counts, "n_seeds": len(runs)}
    return table


def two_level_interval(draws: np.ndarray, rng: np.random.Generator) -> dict:
    """The two-level bootstrap, seeds then prompts, of what S seeds measured on the same prompts.

    Each resample draws S seeds with replacement and averages them on its own prompts. One resample
    of the prompts serves all seeds that it draws, since all were evaluated on the same ones: the
    levels are crossed and not nested (the pigeonhole bootstrap of Owen, Annals of Applied
    Statistics 1, 2007). The spread between few seeds is understated, by (S - 1) / S in variance.

    Args:
        draws: (S, R), as `bootstrap` gives them: column r holds every seed's mean on the prompts of
            resample r.

    Returns:
        `{low, high, p_value}`; fewer than `FEWEST_SEEDS` have no interval, and `no_interval` says
        so.
    """
    seeds, resamples = draws.shape
    if seeds < FEWEST_SEEDS:
        return {**TOO_FEW_SEEDS, "p_value": None}
    picks = rng.integers(0, seeds, (resamples, seeds))
    averaged = draws[picks, np.arange(resamples)[:, None]].mean(axis=1)
    return {**percentile_interval(averaged), "p_value": two_sided_p(averaged)}


def compare_values(
    changes: np.ndarray,
    prompts: np.ndarray,
    strata: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """`compare` for any figure of one run: the mean of paired changes (N,), with the bootstrap over their prompts.

    Args:
        prompts: (N,), what a change belongs to: changes of one prompt are never separated. Cases that stand for
            themselves are `np.arange(N)`.
        strata: (N,), the task of each; without them all prompts are one lot (see `compare_values_over_seeds`).

    Returns:
        `{difference, low, high, p_value, n_prompts, n_images}`.
    """
    lots = np.zeros(len(changes)) if strata is None else strata
    means, draws = bootstrap(changes[None], prompts, lots, resamples, np.random.default_rng(seed))
    interval = {**percentile_interval(draws[0]), "p_value": two_sided_p(draws[0])}
    return {"difference": float(means[0]), **interval, "n_prompts": len(np.unique(prompts)), "n_images": len(prompts)}


def compare_values_over_seeds(
    changes: np.ndarray,
    prompts: np.ndarray,
    strata: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """`compare_over_seeds` for any figure: the mean of paired changes (S, N), with the two-level bootstrap.

    Give the tasks as `strata` where a benchmark has a fixed number of prompts of each, as `compare_over_seeds` does:
    how much tasks differ is then part of the design and not of the error, which is the right interval for a table of
    such a benchmark. Without strata the prompts are drawn as one lot, in which the tasks' numbers vary from draw to
    draw: that interval holds the spread between tasks as well, and is the wider the more they differ.

    Args:
        changes: a row per seed, all on the same images in the same order.
        prompts, strata: (N,), as in `compare_values`.

    Returns:
        `{difference, low, high, p_value, n_prompts, n_images, n_seeds}`; see `two_level_interval` for few seeds.
    """
    lots, rng = np.zeros(changes.shape[1]) if strata is None else strata, np.random.default_rng(seed)
    _, draws = bootstrap(changes, prompts, lots, resamples, rng)
    # at once over seeds and images: changes that cancel make zero, which a mean of the seeds' means may miss by a bit
    difference = float(np.mean([changes[:, lots == lot].mean() for lot in np.unique(lots)]))
    counts = {"n_prompts": len(np.unique(prompts)), "n_images": len(prompts), "n_seeds": len(changes)}
    return {"difference": difference, **two_level_interval(draws, rng), **counts}


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


def seed_difference(values: Sequence[float]) -> dict:
    """`seed_interval` of a paired difference per seed, under the key that a difference has."""
    interval = seed_interval(values)
    return {"difference": interval["mean"], **interval}


def wilson(hits: int, n: int) -> dict:
    """Share of `hits` among `n` independent cases with Wilson's 95 % interval (1927): `{mean, low, high, n}`."""
    z, p = 1.959964, hits / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((center + side) / (1 + z * z / n) for side in (-half, half))
    return {"mean": p, "low": max(low, 0.0), "high": min(high, 1.0), "n": n}  # at 0 and 1 but for rounding


def bracket(cell: dict, form: str = ".1f", scale: float = 1.0) -> str:
    """`[low, high]` of a cell, each `scale` times in this format; or why there is no interval."""
    if cell["low"] is None:
        return f"[{cell.get('no_interval', 'no interval')}]"
    return f"[{scale * cell['low']:{form}}, {scale * cell['high']:{form}}]"
