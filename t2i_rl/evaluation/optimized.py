"""What a sweeper optimises: one metric of a run, known to be measured before anything is drawn."""

from collections.abc import Sequence

from omegaconf import DictConfig

from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.records import HEADLINE_PAIRS
from t2i_rl.evaluation.stats import columns_of, metric_rows
from t2i_rl.methods.irg.evaluation import COSTS

OF_TURNS = (*COSTS, "unfinished", "mends", "breaks", "names_defect", "flags", "false_alarms")
OF_SAMPLES = ("diversity", "vendi")
OF_NOISE = ("target", "health/<figure>", "inside/<figure>")


def optimized(results: dict, name: str | None) -> float | None:
    """What a sweeper optimises: a metric of the stage that the headline is about, else of the last one."""
    if not results.get("stages") or name is None:
        return None
    about = results.get("headline") or {}
    stage = results["stages"][about.get("b") or list(results["stages"])[-1]]["metrics"]
    if name == "headline":
        name = about.get("metric", "overall")
    if name not in stage:
        raise UserError(f"optimized_metric={name} was not measured; choose from {', '.join(stage)}")
    return stage[name]["mean"]


def check_optimized(cfg: DictConfig, benchmark, optimizes: bool) -> None:
    """Whether the run will measure `optimized_metric`.

    Args:
        benchmark: what judges the pictures of the stages.
        optimizes: a sweeper waits for a number; without one `headline` may mean nothing.

    Raises:
        UserError: it will not; the line names what it will.
    """
    name, stages = cfg.optimized_metric, list(cfg.evaluation.stages)
    if name is None or (name == "headline" and not optimizes):
        return
    if not stages:
        raise UserError(f"optimized_metric={name}: nothing is measured with evaluation.stages=[]; give stages")
    _refuse_unless_among(name, ["headline", *_measured(benchmark, _stage_optimized(stages))])


def check_optimized_noise(cfg: DictConfig, benchmark) -> None:
    """The same of a search over noise; `benchmark` is None where none can read the pictures.

    Raises:
        UserError: it will not be measured; the line names what will.
    """
    name = cfg.optimized_metric
    watched = [f"watch/{judge}" for judge in cfg.watch if cfg.watch[judge] is not None]
    measured = ["headline", *OF_NOISE, *watched, *(_measured(benchmark, "last_direct") if benchmark else [])]
    known_by_prefix = ("health/", "inside/", *(f"{judge}/" for judge in watched))
    if name is not None and not str(name).startswith(known_by_prefix):
        _refuse_unless_among(name, measured)


def _refuse_unless_among(name: str, measured: Sequence[str]) -> None:
    if name not in measured:
        raise UserError(f"optimized_metric={name} is not measured by this run; choose from {', '.join(measured)}")


def _stage_optimized(stages: Sequence[str]) -> str:
    """The stage that the headline of these stages is about, else the last that is drawn."""
    drawn = []
    for stage in sorted(stages, key=lambda stage: stage.startswith("trained")):  # the base is drawn first
        side, _, mode = stage.partition("_")
        drawn += [f"{side}_turn1", f"{side}_turn2"] if mode == "turns" else [stage]
    return next((pair[1] for pair in HEADLINE_PAIRS if set(pair) <= set(drawn)), drawn[-1])


def _measured(benchmark, stage: str) -> list[str]:
    """The metrics of a stage: those that its records would have, all of them wrong and drawn with or without a plan."""
    record = {"strict": False, "lenient": False, "score": 0.0, "defects": []}
    records = [
        {
            **record,
            "prompt_id": prompt.id,
            "tag": prompt.tag,
            "seen": prompt.meta.get("seen"),
            "plan_length": 0 if stage.endswith("_plan") else None,
        }
        for prompt in benchmark.prompts()
    ]
    names = [name for name, _, _ in metric_rows(columns_of(records), benchmark.overall_tasks)]
    names += OF_SAMPLES if benchmark.samples_per_prompt > 1 else ()
    return [*names, *(OF_TURNS if "_turn" in stage else ())]
