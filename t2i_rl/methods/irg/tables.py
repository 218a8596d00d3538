"""Tables of a run that draws in turns: what each turn changed, and what the reflections did."""

from collections.abc import Sequence

from t2i_rl.core.contracts import Column
from t2i_rl.evaluation.stage import Stage
from t2i_rl.evaluation.tables import Selection

COSTS = (
    Column("text_tokens", "tokens of text", more_is_better=False, digits=1),
    Column("seconds", "seconds a picture (a batch's, shared out)", more_is_better=False, digits=2),
)
UNFINISHED = Column("unfinished", "texts that did not end", more_is_better=False)
OF_REFLECTIONS = (
    Column("mends", "wrong pictures that the turn mends"),
    Column("breaks", "right pictures that it breaks", more_is_better=False),
    Column("names_defect", "reflections on a wrong picture that name a true defect"),
    Column("flags", "reflections on a wrong picture that name any"),
    Column("false_alarms", "reflections on a right picture that name one", more_is_better=False),
)


def columns_of_turn(turn: int) -> Sequence[Column]:
    """What is measured of a turn beside its pictures; the first has no reflection before it."""
    return (*(OF_REFLECTIONS if turn > 1 else ()), UNFINISHED, *COSTS)


def turn_tables(stages: Sequence[Stage], pairs: Sequence[tuple[str, str]]) -> list[Selection]:
    """Two tables, where something was drawn in turns: of `stages`, and of those `pairs` of them that were compared."""
    turns = [stage.name for stage in stages if stage.turn is not None]
    if not turns:
        return []
    did = (
        "Percent, tokens and seconds, with 95 % bootstrap intervals over prompts. A defect is named where the "
        "reflection has one of the benchmark's own phrases."
    )
    paired = (
        "Points, paired image by image, with 95 % bootstrap intervals over prompts; * excludes zero. `stopped`: the "
        "first picture stands where the reflection finds nothing wrong."
    )
    about = [pair for pair in pairs if set(pair) & set(turns) or Stage.parse(pair[1]).picture == "stopped"]
    return [
        Selection("What each turn did", did, (*OF_REFLECTIONS, UNFINISHED, *COSTS), turns),
        Selection("Turn against turn", paired, pairs=about),
    ]
