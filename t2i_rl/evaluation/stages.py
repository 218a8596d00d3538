"""The stages of a run, drawn one after another, and the results.json that compares them."""

from pathlib import Path

import lightning as L
from omegaconf import DictConfig

from t2i_rl.core.contracts import Benchmark
from t2i_rl.core.errors import UserError
from t2i_rl.core.used_settings import config_names, settings_used
from t2i_rl.evaluation.diversity import compare_diversity, diversity
from t2i_rl.evaluation.drawer import Drawer
from t2i_rl.evaluation.evaluator import evaluate, read_features
from t2i_rl.evaluation.records import write_results
from t2i_rl.evaluation.stage import STAGES, Stage
from t2i_rl.evaluation.stats import aggregate, compare
from t2i_rl.evaluation.tables import row_of


class Stages:
    """Draws stages with one benchmark, one seed, one batch size; `summary` compares all that were drawn.

    Args:
        drawer: how they are drawn, and which of them are compared.
        folder: each stage has its own below it.
    """

    def __init__(
        self, trainer: L.Trainer, drawer: Drawer, benchmark: Benchmark, folder: Path, seed: int, batch_size: int
    ):
        self.trainer, self.drawer, self.benchmark = trainer, drawer, benchmark
        self.folder, self.seed, self.batch_size = Path(folder), seed, batch_size
        self.records: dict[str, list[dict]] = {}

    def draw(self, name: str) -> None:
        """Draw and judge one stage with the model as it is now.

        Raises:
            UserError: no such stage.
        """
        if name not in STAGES:
            raise UserError(f"evaluation.stages holds {name!r}; choose from {', '.join(STAGES)}")
        if self.trainer.is_global_zero:
            images = f"{len(self.benchmark.prompts())} prompts x {self.benchmark.samples_per_prompt} images"
            print(f"{name}: {images}", flush=True)
        folder = self.folder / name
        evaluator = self.drawer.evaluator(Stage.parse(name), self.benchmark, folder, self.seed, self.batch_size)
        self.records |= evaluate(self.trainer, evaluator)

    def summary(self) -> dict:
        """`stages`, `comparisons`, `headline`, `columns` and `tables` as in results.json."""
        tasks, drawn = self.benchmark.overall_tasks, [Stage.parse(name) for name in self.records]
        stages = {}
        for stage in drawn:
            metrics = aggregate(self.records[stage.name], tasks) | self._diversity(stage.name)
            stages[stage.name] = {"metrics": metrics | self.drawer.metrics(stage, self.records)}
        pairs, comparisons = self.drawer.pairs(drawn), []
        for a, b in pairs:
            changes = compare(self.records[a], self.records[b], tasks) | self._diversity_change(a, b)
            comparisons.append({"a": a, "b": b, "metrics": changes})
        about = next((pair for pair in self.drawer.headlines if pair in pairs), None)
        return {
            "stages": stages,
            "comparisons": comparisons,
            "headline": headline_of(about, comparisons, "overall") if about else None,
            "columns": {column.name: row_of(column) for column in self.benchmark.columns},
            "tables": [selection.written() for selection in self.drawer.tables(drawn, pairs)],
        }

    def _diversity(self, stage: str) -> dict:
        features = read_features(self.folder / stage)
        if features is None or self.benchmark.samples_per_prompt < 2:
            return {}
        return diversity(features, [record["prompt_id"] for record in self.records[stage]])

    def _diversity_change(self, a: str, b: str) -> dict:
        before, after = read_features(self.folder / a), read_features(self.folder / b)
        if before is None or after is None or self.benchmark.samples_per_prompt < 2:
            return {}
        return compare_diversity(before, after, [record["prompt_id"] for record in self.records[a]])


def headline_of(pair: tuple[str, str], comparisons: list[dict], metric: str) -> dict:
    """What a run is about, as in results.json: a comparison's stages, and its figure in one metric."""
    changes = {(comparison["a"], comparison["b"]): comparison["metrics"] for comparison in comparisons}
    return {"a": pair[0], "b": pair[1], **changes[pair][metric]}


def write_summary(
    cfg: DictConfig, stages: Stages, steps: int, trained_with: dict | None = None, extra: dict | None = None
) -> dict:
    """Write results.json into the run's folder and return its content. `trained_with`: the settings of the method that
    trained the model; None where nothing did, or where its checkpoint does not say."""
    choices = config_names()
    results = {
        **{key: choices.get(key) for key in ("task", "method", "model", "reward")},
        "seed": cfg.seed,
        "steps": steps,
        "benchmark": stages.benchmark.fingerprint(),
        "sampling": stages.drawer.model.sampling(),
        "settings": settings_used(cfg) | {"method": trained_with},
        **stages.summary(),
        **(extra or {}),
    }
    write_results(Path(cfg.paths.output_dir) / "results.json", results)
    return results
