"""The records of a stage; also of controls that no run has, made from its first pictures, of which a prompt has two.

Each is the control of something that the second picture could be good for: choosing between pictures, mending what the
oracle finds wrong, mending what the model's own reflections find wrong.
"""

from arms import study

BEST_OF_TWO = "best of two"
ANOTHER = "another first picture"
WHERE_WRONG = "another where wrong"
WHERE_FLAGGED = "another where R2 finds fault"


def records(arm: str, stage: str) -> list[list[dict]]:
    """Of each seed, in order of seeds."""
    if stage not in (BEST_OF_TWO, ANOTHER, WHERE_WRONG, WHERE_FLAGGED):
        return study.records(arm, stage)
    first = study.records(arm, "trained_turn1")
    if stage == WHERE_FLAGGED:
        second = study.records(arm, "trained_turn2")
        return [another_where_flagged(*turns) for turns in zip(first, second, strict=True)]
    control = {BEST_OF_TWO: best_of_two, ANOTHER: another, WHERE_WRONG: another_where_wrong}[stage]
    return [control(rows) for rows in first]


def key(row: dict) -> tuple[str, int]:
    return row["prompt_id"], row["sample_index"]


def best_of_two(first: list[dict]) -> list[dict]:
    """Of a prompt's two first pictures the one that the recogniser prefers, in the place of both."""
    best: dict[str, dict] = {}
    for row in first:
        rival = best.get(row["prompt_id"], row)
        best[row["prompt_id"]] = max(row, rival, key=lambda picture: picture["judge_score"])
    return [{**best[row["prompt_id"]], "sample_index": row["sample_index"]} for row in first]


def another(first: list[dict]) -> list[dict]:
    """Every first picture's twin in its place."""
    return [{**row, "sample_index": 1 - row["sample_index"]} for row in first]


def another_where_wrong(first: list[dict]) -> list[dict]:
    """The twin where the oracle finds the picture wrong."""
    twins = {key(row): row for row in another(first)}
    return [row if row["strict"] else twins[key(row)] for row in first]


def another_where_flagged(first: list[dict], second: list[dict]) -> list[dict]:
    """The twin where the model's own reflection on the picture finds a fault."""
    twins, stops = {key(row): row for row in another(first)}, {key(row): row["says_stop"] for row in second}
    return [row if stops[key(row)] else twins[key(row)] for row in first]
