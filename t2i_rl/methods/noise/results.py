"""From finished cases of a noise search to results.json: initial, best and last noise, paired case by case."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from t2i_rl.core.contract_checks import features_of, verdicts_of
from t2i_rl.core.contracts import Benchmark, Column
from t2i_rl.core.pixels import read_image
from t2i_rl.core.prompts import Prompt
from t2i_rl.evaluation.diversity import compare_diversity, diversity
from t2i_rl.evaluation.evaluator import UNJUDGED, judged
from t2i_rl.evaluation.optimized import measured_names, refuse_unless_among
from t2i_rl.evaluation.records import write_records
from t2i_rl.evaluation.stage import Stage
from t2i_rl.evaluation.stages import headline_of
from t2i_rl.evaluation.stats import RESAMPLES, aggregate, bootstrap, compare, percentile_interval, two_sided_p
from t2i_rl.evaluation.tables import Selection, Table, row_of, selected_table, with_interval
from t2i_rl.gaussianity.health import bands

ENDS = ("initial", "best", "last")
HEALTH = Column("health", digits=3)


def picture(folder: Path, case: dict, end: str) -> Path:
    """Where the picture of a case's first, best or last noise lies."""
    return Path(folder) / case["place"] / "images" / ("step_0000.png" if end == "initial" else f"{end}.png")


def summarise(
    out: Path,
    cases: Sequence[dict],
    shape: tuple[int, ...],
    benchmark: Benchmark | None = None,
    prompts: Mapping[str, Prompt] | None = None,
) -> dict:
    """`stages`, `comparisons`, `headline`, `columns` and `tables` as in results.json, of the ends that the cases have;
    records of every stage are written below `out/evaluation`.

    Metrics are the target, what is watched, the health of the noise (`health/...`, and `inside/...`, the share within
    the band of true noise), and, with a benchmark that can read the pictures, its own.

    Args:
        shape: of one case's noise. prompts: by id, for the benchmark to judge.
    """
    ends = [end for end in ENDS if end in cases[0]]
    pairs = [(ends[0], end) for end in ends[1:]]
    ids, tags = (np.array([str(case[key]) for case in cases]) for key in ("prompt_id", "tag"))
    figures = {end: figures_of(cases, end, bands(shape)) for end in ends}
    stages = {end: {"metrics": means(figures[end], ids, tags)} for end in ends}
    changes = {(a, b): differences(figures[a], figures[b], ids, tags) for a, b in pairs}
    records = {end: [record_of(out, case, end) | UNJUDGED for case in cases] for end in ends}
    if benchmark:
        tasks, several = benchmark.overall_tasks, len(set(ids)) < len(ids)
        drawn = [(prompts or {})[case["prompt_id"]] for case in cases]
        features = {end: judge(benchmark, drawn, records[end], images_of(out, cases, end)) for end in ends}
        for end in ends:
            values = features[end] if several else None
            more = {} if values is None else diversity(values, ids.tolist())
            stages[end]["metrics"] = aggregate(records[end], tasks) | more | stages[end]["metrics"]
        for a, b in pairs:
            before, after = features[a] if several else None, features[b]
            more = {} if before is None or after is None else compare_diversity(before, after, ids.tolist())
            changes[a, b] = compare(records[a], records[b], tasks) | more | changes[a, b]
    for end in ends:
        write_records(out / "evaluation" / end / "records.jsonl", records[end])
    comparisons = [{"a": a, "b": b, "metrics": metrics} for (a, b), metrics in changes.items()]
    metric = "overall" if "overall" in comparisons[-1]["metrics"] else "target"
    return {
        "stages": stages,
        "comparisons": comparisons,
        "headline": headline_of(pairs[-1], comparisons, metric) | {"metric": metric},
        "columns": {column.name: row_of(column) for column in (benchmark.columns if benchmark else ())},
        "tables": [search_selection(stages, pairs).written()],
    }


def images_of(out: Path, cases: Sequence[dict], end: str) -> np.ndarray:
    """The cases' pictures at one end, uint8 `(N, H, W, 3)`."""
    return np.stack([np.asarray(read_image(picture(out / "noise", case, end))) for case in cases])


def judge(
    benchmark: Benchmark, prompts: list[Prompt], records: Sequence[dict], images: np.ndarray
) -> np.ndarray | None:
    """Put the benchmark's verdicts on pictures into their records; returns its features of them."""
    for record, prompt, verdict in zip(records, prompts, verdicts_of(benchmark, images, prompts), strict=True):
        record |= {"seen": prompt.meta.get("seen"), **judged(benchmark, prompt, verdict)}
    return features_of(benchmark, images)


def figures_of(cases: Sequence[dict], end: str, limits: dict[str, tuple[float, float]]) -> dict[str, np.ndarray]:
    """Every measured figure, `(N,)`, and whether each figure of health lies within its band."""
    names = [name for name in cases[0]["best"] if name == "target" or name.startswith(("watch/", "health/"))]
    figures = {name: np.array([case[end][name] for case in cases]) for name in names}
    for name, (low, high) in limits.items():
        if f"health/{name}" in figures:
            values = figures[f"health/{name}"]
            figures[f"inside/{name}"] = ((values >= low) & (values <= high)).astype(float)
    return figures


def means(figures: dict[str, np.ndarray], ids: np.ndarray, tags: np.ndarray) -> dict[str, dict]:
    """`{name: {mean, low, high, n_prompts, n_images}}`, bootstrap over prompts within tags."""
    counts = {"n_prompts": len(set(ids)), "n_images": len(ids)}
    resampled = {name: _bootstrap(values, ids, tags) for name, values in figures.items()}
    return {name: {"mean": mean, **percentile_interval(draws), **counts} for name, (mean, draws) in resampled.items()}


def differences(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], ids: np.ndarray, tags: np.ndarray
) -> dict[str, dict]:
    """Paired `b - a` of every figure, in the form of results.json."""
    counts = {"n_prompts": len(set(ids)), "n_images": len(ids)}
    resampled = {name: _bootstrap(b[name] - a[name], ids, tags) for name in a}
    return {
        name: {"difference": mean, **percentile_interval(draws), "p_value": two_sided_p(draws), **counts}
        for name, (mean, draws) in resampled.items()
    }


def _bootstrap(values: np.ndarray, ids: np.ndarray, tags: np.ndarray) -> tuple[float, np.ndarray]:
    mean, draws = bootstrap(values[None], ids, tags, RESAMPLES, np.random.default_rng(0))
    return float(mean[0]), draws[0]


def record_of(out: Path, case: dict, end: str) -> dict:
    """One line of records.jsonl, but for what a benchmark says."""
    image = picture(out / "noise", case, end).relative_to(out)
    about = {key: case[key] for key in ("prompt_id", "prompt", "tag", "sample_index", "seed")}
    return about | {"seen": None, "plan": "", "plan_length": None, "image": f"../../{image}"}


def search_selection(stages: dict, pairs: Sequence[tuple[str, str]]) -> Selection:
    """Target, watched judges and diversity at the first, the best and the last noise; a judge's total that is one of
    its parts stands once."""
    metrics = stages["initial"]["metrics"]
    note = (
        "95 % bootstrap intervals over prompts; differences are paired, case by case; * excludes zero. Best is by the "
        "target itself, and so at least the first."
    )
    if metrics["target"]["low"] is None:
        note += " No interval: a task has one prompt only."
    columns: dict[tuple, Column] = {}
    for name in metrics:
        if name in ("target", "diversity") or name.startswith("watch/"):
            values = tuple(content["metrics"][name]["mean"] for content in stages.values())
            columns.setdefault(values, Column(name, name.removeprefix("watch/"), digits=3))
    title = f"Target, and what was only watched ({counted(metrics)})"
    return Selection(title, note, tuple(columns.values()), tuple(stages), pairs)


def counted(metrics: dict) -> str:
    """How many cases a stage has."""
    return f"{metrics['target']['n_images']} cases of {metrics['target']['n_prompts']} prompts"


def search_table(results: dict) -> Table:
    """The table that `search_selection` asks for."""
    return selected_table(results, Selection.read(results["tables"][0]))


def health_table(results: dict, shape: tuple[int, ...]) -> Table:
    """Natural-order figures of the noise beside the bands of true noise of its shape."""
    rows = []
    for name, (low, high) in bands(shape).items():
        cells = []
        for stage in results["stages"].values():
            value, inside = (stage["metrics"][f"{kind}/{name}"] for kind in ("health", "inside"))
            cells.append(f"{100 * inside['mean']:.0f} %, {with_interval(HEALTH, value, 'mean')}")
        rows.append([name, f"{low:.3f} to {high:.3f}", *cells])
    note = (
        "Share of cases within the band that holds 99 % of true noise; mean, 95 % bootstrap interval over prompts. In "
        "natural order: a penalty's own value does not tell."
    )
    title = f"Is the noise still Gaussian? ({counted(results['stages']['initial']['metrics'])})"
    return Table(title, ["", "true noise", *results["stages"]], rows, note)


def check_optimized(cfg: DictConfig, benchmark: Benchmark | None) -> None:
    """Whether a search will measure `optimized_metric`; `benchmark` is None where none can read the pictures.

    Raises:
        UserError: it will not; the line names what it will.
    """
    name = cfg.optimized_metric
    watched = [f"watch/{judge}" for judge in cfg.watch if cfg.watch[judge] is not None]
    judged = measured_names(benchmark, Stage.parse("last")) if benchmark else []
    known_by_prefix = ("health/", "inside/", *(f"{judge}/" for judge in watched))
    if name is not None and not str(name).startswith(known_by_prefix):
        measured = ["headline", "target", "health/<figure>", "inside/<figure>", *watched, *judged]
        refuse_unless_among(name, measured)
