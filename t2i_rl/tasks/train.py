"""`task=train`: evaluate the base, train, evaluate again, and write it all down."""

from pathlib import Path

from hydra.utils import instantiate
from rich.console import Console

from t2i_rl.callbacks.no_spread import NoSpread
from t2i_rl.callbacks.validation import Validate
from t2i_rl.core.errors import UserError
from t2i_rl.core.used_settings import recipe_of
from t2i_rl.evaluation.report.html import write_report
from t2i_rl.evaluation.stage import Stage
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.evaluation.tables import headline, run_tables
from t2i_rl.rewards.processors import image_processors
from t2i_rl.tasks.examine import by_setting, check_drawing, check_method, examine, method_of
from t2i_rl.tasks.loggers import log_results


def check(cfg) -> None:
    """Refuse what cannot be trained.

    Raises:
        UserError: one line that says what to change.
    """
    method = method_of(cfg)
    if method.searches_noise:
        raise UserError(
            f"task=train and {method.__name__} do not go together: leave task= out, the method brings its own"
        )
    check_method(cfg, training=True)
    check_drawing(cfg)
    if cfg.model.get("temperature") == 0:
        raise UserError(
            "model.temperature=0 draws greedily: a group of equal images teaches nothing; take a temperature above 0"
        )


def run(cfg) -> dict:
    """Train `cfg.method` on `cfg.model` with `cfg.reward`; returns the content of results.json."""
    out, parts = Path(cfg.paths.output_dir), examine(cfg)
    trainer, benchmark = parts.trainer, parts.benchmark
    model = instantiate(cfg.model)
    method = build_method(cfg, model, parts.judge, parts.reward, parts.watch)
    evaluation, drawer = cfg.evaluation, method.drawer(model, method)
    stages = Stages(trainer, drawer, benchmark, out / "evaluation", evaluation.seed, evaluation.batch_size)

    for stage in evaluation.stages:
        if Stage.parse(stage).side == "base":
            stages.draw(stage)
    trainer.fit(method, parts.data, ckpt_path=cfg.ckpt_path, weights_only=True)
    steps = trainer.global_step
    for stage in evaluation.stages:
        if Stage.parse(stage).side == "trained":
            stages.draw(stage)

    judges = by_setting(parts.reward, parts.watch)
    for name, callback in parts.callbacks.items():
        if isinstance(callback, Validate):
            judges |= {f"callbacks.{name}.judges.{key}": judge for key, judge in callback.judges.items()}
    watchers = [callback for callback in trainer.callbacks if isinstance(callback, NoSpread)]
    warnings = [line for watcher in watchers for line in watcher.warnings.values()]
    extra = {"image_processors": image_processors(judges)} | ({"warnings": warnings} if warnings else {})
    results = write_summary(cfg, stages, steps, method.resolved_settings(), extra)
    log_results(trainer.loggers, results)
    if trainer.is_global_zero:
        console = Console()
        if results["stages"]:
            for table in run_tables(results):
                console.print(table)
        console.print(headline(results))
        console.print(f"report: {write_report(out)}", soft_wrap=True)
    return results


def build_method(cfg, model, judge=None, reward=None, watch: dict | None = None):
    """`cfg.method` on a model; what learns from given pictures has no reward and watches none.

    Where nothing is trained, rewards need not load.
    """
    kind = method_of(cfg)
    parts = {"judge": judge} if kind.draws_in_turns else {}
    if kind.learns_from == "prompts":
        parts |= {"reward": reward, "watch": watch or {}}
    method = instantiate(cfg.method, model=model, **parts)
    method.recipe = recipe_of(cfg, method.decide_what_learns)
    return method
