"""Training curves from metrics.csv as inline SVG, grouped by what they measure and coloured by the page's own style."""

import csv
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

# A column goes to the first group whose pattern it matches, so the narrow patterns stand before the wide ones.
GROUPS = (
    ("Seconds per step", r"^time/"),
    ("Correlation of reward with plan length", r"corr"),
    ("Plan length", r"plan_length"),
    ("Truncated plans", r"truncated"),
    ("Distinct plans", r"distinct"),
    ("Groups without any spread", r"zero_std"),
    ("Reward, spread within a group", r"std"),
    ("Watched, not trained on", r"^watch"),
    ("Reward", r"reward"),
    ("Accuracy", r"accuracy|strict|lenient|correct"),
    ("KL to the reference", r"(^|[/_])kl"),
    ("Self-certainty", r"certainty"),
    ("Entropy", r"entropy"),
    ("Clip fraction", r"clip"),
    ("Importance ratio", r"ratio"),
    ("Codebook entries used", r"codebook|codes"),
    ("Gap to the sampler's log-probability", r"gap"),
    ("Gradient norm", r"grad"),
    ("Loss", r"loss"),
    ("Images per second", r"images_?per_s"),
    ("Tokens per second", r"tokens_?per_s"),
    ("Peak memory", r"memory"),
    ("Learning rate", r"(^|[/_-])lr"),
)
FIRST = ("Reward", "Watched, not trained on", "Reward, spread within a group", "Plan length")
COLORS = 6
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 190, 52, 10, 8, 24

Series = tuple[str, np.ndarray, np.ndarray]


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every numeric column of a Lightning metrics.csv as (steps, values), without empty and non-finite rows."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    with Path(path).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name in ("step", "epoch") or not text or not math.isfinite(float(text)):
                    continue
                steps, values = columns.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(float(text))
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def group_columns(columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, list[Series]]:
    """Columns of two points or more by title of `GROUPS`, in reading order; columns of no group are left out."""
    groups: dict[str, list[Series]] = {}
    for name, (steps, values) in columns.items():
        title = next((title for title, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), None)
        if title and len(steps) > 1:
            groups.setdefault(title, []).append((name, steps, values))
    order = dict.fromkeys([*FIRST, *(title for title, _ in GROUPS)])
    return {title: groups[title] for title in order if title in groups}


def ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """About `count` round numbers that lie within [low, high], at least `least` apart."""
    rough = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def span(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """The smallest and largest value, moved apart where they are equal."""
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the curve, over fewer points at its ends."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def polyline(x: np.ndarray, y: np.ndarray, style: str) -> str:
    """An SVG line through points in pixels."""
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{style}" points="{points}"/>'


def chart(title: str, series: Sequence[Series]) -> str:
    """One chart as an HTML figure: title, SVG with axes, legend. Curves of 40 points or more get a running mean."""
    low_x, high_x = span([steps for _, steps, _ in series])
    low_y, high_y = span([values for _, _, values in series])
    low_y, high_y = low_y - 0.04 * (high_y - low_y), high_y + 0.04 * (high_y - low_y)

    def across(x: Any) -> Any:  # a number, or an array of some
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def down(y: Any) -> Any:
        return TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(low_y, high_y, 4):
        y = down(value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(low_x, high_x, 5, least=1):  # there is no half of a step
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{value:.6g}</text>')
    for number, (_, steps, values) in enumerate(series):
        color, long = f"c{number % COLORS}", len(values) >= 40
        parts.append(polyline(across(steps), down(values), f"{color} faint" if long else color))
        if long:
            parts.append(polyline(across(steps), down(running_mean(values)), color))
    keys = "".join(f'<li class="k{number % COLORS}">{escape(name)}</li>' for number, (name, _, _) in enumerate(series))
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}<ul class="legend">{keys}</ul></figure>'


def charts(metrics_csv: Path) -> str:
    """All charts of a run as HTML; empty where no column has two points."""
    groups = group_columns(read_metrics(metrics_csv))
    return "".join(chart(title, series) for title, series in groups.items())
