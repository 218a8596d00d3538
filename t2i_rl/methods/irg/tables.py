"""Tables of a run that draws in turns: what each turn changed, and what the reflections did."""

from t2i_rl.evaluation.records import stages_of
from t2i_rl.evaluation.tables import ROW_NAMES, Table, metric_order, with_interval

DID = {
    "mends": "wrong pictures that the turn mends",
    "breaks": "right pictures that it breaks",
    "names_defect": "reflections on a wrong picture that name a true defect",
    "flags": "reflections on a wrong picture that name any",
    "false_alarms": "reflections on a right picture that name one",
    "unfinished": "texts that did not end",
    "text_tokens": "tokens of text",
    "seconds": "seconds a picture (a batch's, shared out)",
}


def turn_tables(results: dict) -> list[Table]:
    """None where nothing was drawn in turns."""
    turns = [stage for stage in stages_of(results) if "_turn" in stage]
    if not turns:
        return []
    cells = [[results["stages"][stage]["metrics"].get(name) for stage in turns] for name in DID]
    did = [[DID[name], *(with_interval(name, cell, "mean") for cell in row)] for name, row in zip(DID, cells, strict=True) if any(row)]  # fmt: skip
    note = "Percent, tokens and seconds, with 95 % bootstrap intervals over prompts. A defect is named where the reflection has one of the oracle's own phrases."
    about = [comparison for comparison in results["comparisons"] if "_turn" in comparison["a"] + comparison["b"] or comparison["b"].endswith("_stopped")]  # fmt: skip
    changes = [
        [ROW_NAMES.get(name, name.removeprefix("task/")), *(with_interval(name, comparison["metrics"].get(name), "difference") for comparison in about)]
        for name in metric_order(results)
        if any(name in comparison["metrics"] for comparison in about)
    ]  # fmt: skip
    columns = ["", *(f"{comparison['b']} - {comparison['a']}" for comparison in about)]
    paired = "Points, paired image by image, with 95 % bootstrap intervals over prompts; * excludes zero. `stopped`: the first picture stands where the reflection finds nothing wrong."
    return [
        Table("What each turn did", ["", *turns], did, note),
        Table("Turn against turn", columns, changes, paired),
    ]
