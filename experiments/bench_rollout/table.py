"""What bench.py measured, as Markdown. Ratios are between two rows of one dtype, round by round."""

import statistics

from experiments.bench_rollout.bench import CHUNK, PLAIN, PLAIN_AT_ONCE
from experiments.bench_rollout.measure import ratios


def table(result: dict) -> str:
    """All tables of one result of `bench`, with its command, machine, note and GRPO step where it has them."""
    timed = [row for row in [*result["rows"], *result["plans"]] if row["seconds"]]
    rounds = min((len(row["seconds"]) for row in timed), default=0)  # the last may be half done
    rows, plans = (
        [row | {"seconds": row["seconds"][:rounds]} for row in result[phase] if row["seconds"]]
        for phase in ("rows", "plans")
    )
    times = f"times plain ({CHUNK} at a time) | times plain (all at once)"
    lines = [
        f"### {result['size']}: {result['images']} images of {result['image_tokens']} tokens\n",
        f"`{result['command']}` on {result['machine']}, torch {result['torch']}. Medians of {rounds} interleaved "
        "rounds; ratios are taken round by round, [least, greatest], and between two of one dtype.\n",
        *([f"{result['note']}\n"] if "note" in result else []),
        f"| image phase | dtype | images/s | tokens/s | peak GiB | {times} | roofline | floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = statistics.median(row["seconds"])
        rate = _images(row, result) / seconds
        shares = [
            f"{100 * row['floors'][key] / seconds:.0f} %" if "floors" in row else "" for key in ("memory", "floor")
        ]
        numbers = [f"{rate:.2f}", f"{rate * result['image_tokens']:.0f}", f"{row['peak_gib']:.2f}"]
        lines.append(_line(row["name"], row["dtype"], *numbers, *ratios_to(rows, row, result), *shares))
    if plans:
        lines += [f"\n| plan phase | dtype | plans/s | {times} |", "|---|---|---|---|---|"]
    for row in plans:
        rate = _images(row, result) / statistics.median(row["seconds"])
        lines.append(_line(row["name"], row["dtype"], f"{rate:.2f}", *ratios_to(plans, row, result)))
    if "step" in result:
        lines.append(f"\n{step_line(result['step'])}")
    return "\n".join(lines)


def _images(row: dict, result: dict) -> int:
    """How many images (or plans) a call made; results of before chunks could be left out say none, and made all."""
    return row.get("images", result["images"])


def ratios_to(rows: list[dict], row: dict, result: dict) -> list[str]:
    """How many times as fast a row is as the plain loops of its own dtype, in chunks and at once."""
    cells = []
    for name in (PLAIN, PLAIN_AT_ONCE):
        loop = next((other for other in rows if (other["name"], other["dtype"]) == (name, row["dtype"])), None)
        if loop is None:
            cells.append("not measured")
            continue
        slow, fast = ([seconds / _images(each, result) for seconds in each["seconds"]] for each in (loop, row))
        cells.append("{:.2f}x [{:.2f}, {:.2f}]".format(*ratios(slow, fast)))
    return cells


def step_line(step: dict) -> str:
    """A whole GRPO step in one sentence."""
    total = step["seconds"]
    shares = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in step["phases"].items())
    return f"A whole GRPO step ({step['rows']} rows): {total:.1f} s, peak {step['peak_gib']:.1f} GiB; {shares}."


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
