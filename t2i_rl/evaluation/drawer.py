"""How the stages of a run are drawn, and what is said of them beside a benchmark's numbers: what a method may bring."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i_rl.core.contracts import Benchmark, Column, ImageModel
from t2i_rl.evaluation.evaluator import Evaluator
from t2i_rl.evaluation.stage import Stage
from t2i_rl.evaluation.tables import Selection

Pair = tuple[str, str]


class Drawer:
    """Draws each prompt once a sample, directly or with a plan. A method that draws otherwise names a subclass.

    compared: pairs of stages `(a, b)` that are compared where both were drawn.
    headlines: pairs that a run may be about; the first of those that were compared.

    Args:
        model: what draws. method: what it belongs to, for a subclass; None where nothing is trained.
    """

    compared: Sequence[Pair] = (
        ("base_direct", "base_plan"),
        ("base_plan", "trained_plan"),
        ("base_direct", "trained_direct"),
        ("base_direct", "trained_plan"),
    )
    headlines: Sequence[Pair] = (("base_plan", "trained_plan"), ("base_direct", "trained_direct"))

    def __init__(self, model: ImageModel, method: Any = None):
        self.model, self.method = model, method

    @classmethod
    def gives(cls, stage: Stage) -> list[Stage]:
        """The stages that come out where this one is asked for, as far as its name tells."""
        return [stage]

    @classmethod
    def columns(cls, stage: Stage) -> Sequence[Column]:
        """What `metrics` measures of a stage, known before it is drawn."""
        return ()

    def evaluator(self, stage: Stage, benchmark: Benchmark, folder: Path, seed: int, batch_size: int) -> Evaluator:
        """What draws a stage and has it judged, into `folder`, which has its name."""
        return Evaluator(self.model, benchmark, stage.way, folder, seed, batch_size)

    def metrics(self, stage: Stage, records: Mapping[str, Sequence[dict]]) -> dict[str, dict]:
        """What is measured of a stage beside its benchmark's numbers, as in results.json; `records` of all stages."""
        return {}

    def pairs(self, stages: Sequence[Stage]) -> list[Pair]:
        """What is compared among the stages that were drawn."""
        names = {stage.name for stage in stages}
        return [pair for pair in self.compared if set(pair) <= names]

    def tables(self, stages: Sequence[Stage], pairs: Sequence[Pair]) -> list[Selection]:
        """Tables of a run beside the one of before and after; `pairs` are those that were compared."""
        return []
