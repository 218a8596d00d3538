"""What a sweeper optimises: one metric of a run, known to be measured before anything is drawn."""

from collections.abc import Sequence
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig

from t2i_rl.core.contracts import Benchmark
from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.drawer import Drawer
from t2i_rl.evaluation.stage import SIDES, Stage
from t2i_rl.evaluation.stats import columns_of, metric_rows

OF_SAMPLES = ("diversity", "vendi")


def check_optimized(cfg: DictConfig, benchmark: Benchmark, optimizes: bool) -> None:
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
    method: Any = get_class(cfg.method._target_)
    drawer = method.drawer
    stage = _stage_optimized([Stage.parse(stage) for stage in stages], drawer)
    own = [column.name for column in drawer.columns(stage)]
    refuse_unless_among(name, ["headline", *measured_names(benchmark, stage), *own])


def refuse_unless_among(name: str, measured: Sequence[str]) -> None:
    """Refuse a metric that is not measured.

    Raises:
        UserError: it is not; the line names what is.
    """
    if name not in measured:
        raise UserError(f"optimized_metric={name} is not measured by this run; choose from {', '.join(measured)}")


def measured_names(benchmark: Benchmark, stage: Stage) -> list[str]:
    """The metrics of a stage that a benchmark will give, told from records of its prompts that nobody has drawn yet."""
    record = {"strict": False, "lenient": False, "score": 0.0, "plan_length": None if stage.way == "direct" else 0}
    records = [
        {
            **record,
            "prompt_id": prompt.id,
            "tag": prompt.tag,
            "seen": prompt.meta.get("seen"),
            "measured": {c.name: 0.0 for c in benchmark.columns if prompt.tag in (c.tasks or (prompt.tag,))},
        }
        for prompt in benchmark.prompts()
    ]
    names = [name for name, _, _ in metric_rows(columns_of(records), benchmark.overall_tasks)]
    varied = benchmark.samples_per_prompt > 1 and type(benchmark).features is not Benchmark.features
    return [*names, *(OF_SAMPLES if varied else ())]


def _stage_optimized(stages: Sequence[Stage], drawer: type[Drawer]) -> Stage:
    """The stage that the headline of these stages is about, else the last that is drawn."""
    in_order = sorted(stages, key=lambda stage: SIDES.index(stage.side))  # the base is drawn first
    drawn = [given for stage in in_order for given in drawer.gives(stage)]
    names = [stage.name for stage in drawn]
    about = next((pair[1] for pair in drawer.headlines if set(pair) <= set(names)), names[-1])
    return Stage.parse(about)
