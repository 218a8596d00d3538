"""From finished cases of a noise search to results.json: initial, best and last noise, paired case by case."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t2i_rl.core.contract_checks import features_of, verdicts_of
from t2i_rl.core.pixels import read_image
from t2i_rl.evaluation.diversity import compare_diversity, diversity
from t2i_rl.evaluation.records import write_records
from t2i_rl.evaluation.stats import RESAMPLES, aggregate, bootstrap, bracket, compare, percentile_interval, two_sided_p
from t2i_rl.evaluation.tables import Table, excludes_zero
from t2i_rl.gaussianity.health import bands

ENDS = ("initial", "best", "last")


def picture(folder: Path, case: dict, end: str) -> Path:
    return Path(folder) / case["place"] / "images" / ("step_0000.png" if end == "initial" else f"{end}.png")


def summarise(
    out: Path, cases: Sequence[dict], shape: tuple[int, ...], benchmark=None, prompts: dict | None = None
) -> dict:
    """`stages` and `comparisons` as in results.json, of the ends that the cases have; records of every stage are written below `out/evaluation`.

    Metrics are the target, what is watched, the health of the noise (`health/...`, and `inside/...`, the share within the band of true noise), and, with a
    benchmark that can read the pictures, its own.

    Args:
        shape: of one case's noise. prompts: by id, for the benchmark to judge.
    """
    folder, limits = out / "noise", bands(shape)
    records, columns, features = {}, {}, {}
    ends = [end for end in ENDS if end in cases[0]]
    for end in ends:
        images = np.stack([np.asarray(read_image(picture(folder, case, end))) for case in cases])
        verdicts = (
            verdicts_of(benchmark, images, [prompts[case["prompt_id"]] for case in cases])
            if benchmark
            else [None] * len(cases)
        )
        features[end] = features_of(benchmark, images) if benchmark else None
        records[end] = [
            _record(out, folder, case, end, verdict, prompts) for case, verdict in zip(cases, verdicts, strict=True)
        ]
        write_records(out / "evaluation" / end / "records.jsonl", records[end])
        columns[end] = columns_of(cases, end, limits)
    ids, tags = (np.array([str(case[key]) for case in cases]) for key in ("prompt_id", "tag"))
    several = len(set(ids)) < len(ids)
    stages = {end: {"metrics": means(columns[end], ids, tags)} for end in ends}
    pairs = [(ends[0], end) for end in ends[1:]]
    comparisons = [{"a": a, "b": b, "metrics": differences(columns[a], columns[b], ids, tags)} for a, b in pairs]
    if benchmark:
        for end in ends:
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
    judged = {"strict": None, "lenient": None, "score": None, "defects": []}
    if verdict is not None:
        judged = {"strict": verdict.strict, "lenient": verdict.lenient, "score": verdict.score}
        judged["defects"] = [defect.text for defect in verdict.defects]
    kept = {key: case[key] for key in ("prompt_id", "prompt", "tag", "sample_index", "seed")}
    return kept | {"seen": seen, "plan": "", "plan_length": None, **judged, "image": f"../../{place}"}


def search_table(results: dict) -> Table:
    """Target, watched judges and diversity at the first, the best and the last noise."""
    metrics = results["stages"]["initial"]["metrics"]
    names = [name for name in metrics if name == "target" or name.startswith("watch/") or name == "diversity"]
    rows = {
        tuple(_cells(results, name)): name.removeprefix("watch/") for name in reversed(names)
    }  # a judge's total may be one of its parts
    note = (
        "95 % bootstrap intervals over prompts; differences are paired, case by case; * excludes zero. Best is by the target itself, and so at least the first."
        + (" No interval: a task has one prompt only." if metrics["target"]["low"] is None else "")
    )
    columns = ["", *results["stages"], *(f"{each['b']} - {each['a']}" for each in results["comparisons"])]
    return Table(f"Target, and what was only watched ({_counted(results)})", columns, [[name, *cells] for cells, name in reversed(rows.items())], note)  # fmt: skip


def health_table(results: dict, shape: tuple[int, ...]) -> Table:
    """Natural-order figures of the noise beside the bands of true noise of its shape."""
    rows = []
    for name, (low, high) in bands(shape).items():
        cells = []
        for stage in results["stages"].values():
            value, inside = (stage["metrics"][f"{kind}/{name}"] for kind in ("health", "inside"))
            cells.append(f"{100 * inside['mean']:.0f} %, {_text(value['mean'], value)}")
        rows.append([name, f"{low:.3f} to {high:.3f}", *cells])
    note = "Share of cases within the band that holds 99 % of true noise; mean, 95 % bootstrap interval over prompts. In natural order: a penalty's own value does not tell."
    return Table(
        f"Is the noise still Gaussian? ({_counted(results)})", ["", "true noise", *results["stages"]], rows, note
    )


def _counted(results: dict) -> str:
    cell = results["stages"]["initial"]["metrics"]["target"]
    return f"{cell['n_images']} cases of {cell['n_prompts']} prompts, seed {results['seed']}"


def _cells(results: dict, name: str) -> list[str]:
    cells = []
    for stage in results["stages"].values():
        cell = stage["metrics"][name]
        cells.append(_text(cell["mean"], cell))
    for comparison in results["comparisons"]:
        cell = comparison["metrics"][name]
        cells.append(_text(cell["difference"], cell, "+") + (" *" if excludes_zero(cell) else ""))
    return cells


def _text(value: float, cell: dict, sign: str = "") -> str:
    return f"{value:{sign}.3f} {bracket(cell, f'{sign}.3f')}"
