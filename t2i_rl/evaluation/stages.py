"""The stages of a run (base and trained, direct and with a plan), and the results.json that compares them."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.recipes import config_names, settings_used
from t2i_rl.evaluation.diversity import compare_diversity, diversity
from t2i_rl.evaluation.evaluator import Evaluator, evaluate
from t2i_rl.evaluation.records import STAGES, headline_comparison, write_results
from t2i_rl.evaluation.stats import aggregate, compare
from t2i_rl.methods.irg.evaluation import turn_metrics

COMPARED = (
    ("base_direct", "base_plan"),
    ("base_plan", "trained_plan"),
    ("base_direct", "trained_direct"),
    ("base_direct", "trained_plan"),
    *(("base_direct", f"{side}_turn1") for side in ("base", "trained")),
    ("base_plan", "trained_turn1"),
    ("base_plan", "trained_turn2"),
    *((f"{side}_turn1", f"{side}_{answer}") for side in ("base", "trained") for answer in ("stopped", "chosen")),
    ("base_plan", "trained_stopped"),
    *((f"base_{turn}", f"trained_{turn}") for turn in ("turn1", "turn2", "stopped")),
)


class Stages:
    """Draws stages one after another with one benchmark, one seed, one batch size; `summary` compares all that were drawn.

    `turns(benchmark, folder, seed, batch_size)` makes the evaluator of stages `base_turns` and `trained_turns`, which come out as one stage a turn.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: torch.nn.Module,
        benchmark,
        folder: Path,
        seed: int,
        batch_size: int,
        turns: Callable | None = None,
    ):
        self.turns = turns
        self.trainer, self.model, self.benchmark = trainer, model, benchmark
        self.folder, self.seed, self.batch_size = Path(folder), seed, batch_size
        self.records: dict[str, list[dict]] = {}

    def draw(self, stage: str) -> None:
        """Draw and judge one stage with the model as it is now.

        Raises:
            UserError: no such stage.
        """
        if stage not in STAGES:
            raise UserError(f"evaluation.stages holds {stage!r}; choose from {', '.join(STAGES)}")
        mode = stage.split("_")[1]
        if self.trainer.is_global_zero:
            print(
                f"{stage}: {len(self.benchmark.prompts())} prompts x {self.benchmark.samples_per_prompt} images",
                flush=True,
            )
        where = (self.benchmark, self.folder / stage, self.seed, self.batch_size)
        evaluator = self.turns(*where) if mode == "turns" else Evaluator(self.model, where[0], mode, *where[1:])
        self.records |= evaluate(self.trainer, evaluator)

    def summary(self) -> dict:
        """`stages` and `comparisons` as in results.json."""
        stages = {
            stage: {
                "metrics": aggregate(records, self.benchmark.overall_tasks) | self._diversity(stage) | self._turn(stage)
            }
            for stage, records in self.records.items()
        }
        turns = [stage for stage in self.records if "_turn" in stage]
        consecutive = [(a, b) for a, b in pairwise(turns) if a.split("_")[0] == b.split("_")[0]]
        pairs = [*(pair for pair in COMPARED if set(pair) <= set(self.records)), *consecutive]
        comparisons = [
            {
                "a": a,
                "b": b,
                "metrics": compare(self.records[a], self.records[b], self.benchmark.overall_tasks)
                | self._diversity_change(a, b),
            }
            for a, b in pairs
        ]
        return {"stages": stages, "comparisons": comparisons}

    def _turn(self, stage: str) -> dict:
        """What a turn has beside its pictures, the reflection between it and the turn before among it."""
        side, _, turn = stage.partition("_turn")
        if not turn:
            return {}
        return turn_metrics(self.records[stage], self.records.get(f"{side}_turn{int(turn) - 1}"))

    def _features(self, stage: str) -> np.ndarray:
        return np.load(self.folder / stage / "features.npy")

    def _diversity(self, stage: str) -> dict:
        if self.benchmark.samples_per_prompt < 2:
            return {}
        return diversity(self._features(stage), [record["prompt_id"] for record in self.records[stage]])

    def _diversity_change(self, a: str, b: str) -> dict:
        if self.benchmark.samples_per_prompt < 2:
            return {}
        return compare_diversity(
            self._features(a), self._features(b), [record["prompt_id"] for record in self.records[a]]
        )


def write_summary(cfg, stages: Stages, steps: int, trained_with: dict | None = None, extra: dict | None = None) -> dict:
    """Write results.json into the run's folder and return its content. `trained_with`: the settings of the method that
    trained the model; None where nothing did, or where its checkpoint does not say."""
    choices = config_names()
    results = {
        "task": choices.get("task"),
        "method": choices.get("method"),
        "model": choices.get("model"),
        "reward": choices.get("reward"),
        "seed": cfg.seed,
        "steps": steps,
        "benchmark": stages.benchmark.fingerprint(),
        "sampling": stages.model.sampling(),
        "settings": settings_used(cfg) | {"method": trained_with},
        **stages.summary(),
        **(extra or {}),
    }
    comparison = headline_comparison(results)
    results["headline"] = (
        {"a": comparison["a"], "b": comparison["b"], **comparison["metrics"]["overall"]} if comparison else None
    )
    write_results(Path(cfg.paths.output_dir) / "results.json", results)
    return results
