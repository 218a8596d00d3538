"""From finished cases of a noise search to results.json: initial, best and last noise, paired case by case."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_rl.evaluation.diversity import compare_diversity, diversity
from t2i_rl.evaluation.results import write_records
from t2i_rl.evaluation.stats import RESAMPLES, aggregate, bootstrap, compare, percentile_interval, two_sided_p
from t2i_rl.evaluation.tables import Table, excludes_zero
from t2i_rl.gaussianity.health import bands

ENDS = ("initial", "best", "last")
PAIRS = (("initial", "best"), ("initial", "last"))


def picture(folder: Path, case: dict, end: str) -> Path:
    return Path(folder) / case["place"] / "images" / ("step_0000.png" if end == "initial" else f"{end}.png")


def summarise(
    out: Path, cases: Sequence[dict], shape: tuple[int, ...], benchmark=None, prompts: dict | None = None
) -> dict:
    """`stages` and `comparisons` as in results.json; records of every stage are written below `out/evaluation`.

    Metrics are the target, what is watched, the health of the noise (`health/...`, and `inside/...`, the share within the band of true noise), and, with a
    benchmark that can read the pictures, its own.

    Args:
        shape: of one case's noise. prompts: by id, for the benchmark to judge.
    """
    folder, limits = out / "noise", bands(shape)
    records, columns, features = {}, {}, {}
    for end in ENDS:
        images = np.stack([np.asarray(Image.open(picture(folder, case, end)).convert("RGB")) for case in cases])
        verdicts = (
            benchmark.judge(images, [prompts[case["prompt_id"]] for case in cases])
            if benchmark
            else [None] * len(cases)
        )
        features[end] = benchmark.features(images) if benchmark else None
        records[end] = [
            _record(out, folder, case, end, verdict, prompts) for case, verdict in zip(cases, verdicts, strict=True)
        ]
        write_records(out / "evaluation" / end / "records.jsonl", records[end])
        columns[end] = columns_of(cases, end, limits)
    ids, tags = (np.array([str(case[key]) for case in cases]) for key in ("prompt_id", "tag"))
    several = len(set(ids)) < len(ids)
    stages = {end: {"metrics": means(columns[end], ids, tags)} for end in ENDS}
    comparisons = [{"a": a, "b": b, "metrics": differences(columns[a], columns[b], ids, tags)} for a, b in PAIRS]
    if benchmark:
        for end in ENDS:
            judged = aggregate(records[end], benchmark.overall_tasks)
            stages[end]["metrics"] = (
                judged | (diversity(features[end], ids) if several else {}) | stages[end]["metrics"]
            )
        for each in comparisons:
            a, b = each["a"], each["b"]
            judged = compare(records[a], records[b], benchmark.overall_tasks)
            each["metrics"] = (
                judged | (compare_diversity(features[a], features[b], ids) if several else {}) | each["metrics"]
            )
    return {"stages": stages, "comparisons": comparisons}


def columns_of(cases: Sequence[dict], end: str, limits: dict[str, tuple[float, float]]) -> dict[str, np.ndarray]:
    """Every measured figure, `(N,)`, and whether each figure of health lies within its band."""
    names = [name for name in cases[0]["best"] if name == "target" or name.startswith(("watch/", "health/"))]
    found = {name: np.array([case[end][name] for case in cases]) for name in names}
    for name, (low, high) in limits.items():
        if f"health/{name}" in found:
            found[f"inside/{name}"] = ((found[f"health/{name}"] >= low) & (found[f"health/{name}"] <= high)).astype(
                float
            )
    return found


def means(columns: dict[str, np.ndarray], ids: np.ndarray, tags: np.ndarray) -> dict[str, dict]:
    """`{name: {mean, low, high, n_prompts, n_images}}`, bootstrap over prompts within tags."""
    counts = {"n_prompts": len(set(ids)), "n_images": len(ids)}
    drawn = {name: _bootstrap(values, ids, tags) for name, values in columns.items()}
    return {name: {"mean": mean, **percentile_interval(draws), **counts} for name, (mean, draws) in drawn.items()}


def differences(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], ids: np.ndarray, tags: np.ndarray
) -> dict[str, dict]:
    """Paired `b - a` of every column, in the form of results.json."""
    counts = {"n_prompts": len(set(ids)), "n_images": len(ids)}
    drawn = {name: _bootstrap(b[name] - a[name], ids, tags) for name in a}
    return {
        name: {"difference": mean, **percentile_interval(draws), "p_value": two_sided_p(draws), **counts}
        for name, (mean, draws) in drawn.items()
    }


def _bootstrap(values: np.ndarray, ids: np.ndarray, tags: np.ndarray) -> tuple[float, np.ndarray]:
    mean, draws = bootstrap(values[None], ids, tags, RESAMPLES, np.random.default_rng(0))
    return float(mean[0]), draws[0]


def _record(out: Path, folder: Path, case: dict, end: str, verdict, prompts: dict | None) -> dict:
    place = picture(folder, case, end).relative_to(out)
    seen = prompts[case["prompt_id"]].meta.get("seen") if prompts else None
    judged = {key: getattr(verdict, key) for key in ("strict", "lenient", "score", "defects")} if verdict else {"strict": None, "lenient": None, "score": None, "defects": []}  # fmt: skip
    kept = {key: case[key] for key in ("prompt_id", "prompt", "tag", "sample_index", "seed")}
    return kept | {"seen": seen, "plan": "", "plan_length": None, **judged, "image": f"../../{place}"}


def search_table(results: dict) -> Table:
    """Target and watched judges at the first, the best and the last noise."""
    names = [name for name in results["stages"]["initial"]["metrics"] if name == "target" or name.startswith("watch/")]
    rows = [[name.removeprefix("watch/"), *_cells(results, name)] for name in names]
    note = "95 % bootstrap intervals over prompts; differences are paired, case by case; * excludes zero. Best is by the target itself, and so at least the first."
    return Table("Target, and what was only watched", ["", *ENDS, *(f"{b} - {a}" for a, b in PAIRS)], rows, note)


def health_table(results: dict, shape: tuple[int, ...]) -> Table:
    """Natural-order figures of the noise beside the bands of true noise of its shape."""
    rows = []
    for name, (low, high) in bands(shape).items():
        cells = []
        for end in ENDS:
            metrics = results["stages"][end]["metrics"]
            cells.append(f"{metrics[f'health/{name}']['mean']:.3f} ({100 * metrics[f'inside/{name}']['mean']:.0f} %)")
        rows.append([name, f"{low:.3f} to {high:.3f}", *cells])
    note = "Mean over cases, and the share of cases within the band that holds 99 % of true noise. In natural order: a penalty's own value does not tell."
    return Table("Is the noise still Gaussian?", ["", "true noise", *ENDS], rows, note)


def _cells(results: dict, name: str) -> list[str]:
    cells = []
    for end in ENDS:
        cell = results["stages"][end]["metrics"][name]
        cells.append(_text(cell["mean"], cell))
    for comparison in results["comparisons"]:
        cell = comparison["metrics"][name]
        cells.append(_text(cell["difference"], cell, "+") + (" *" if excludes_zero(cell) else ""))
    return cells


def _text(value: float, cell: dict, sign: str = "") -> str:
    if cell["low"] is None:
        return f"{value:{sign}.3f} [no interval]"
    return f"{value:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"
