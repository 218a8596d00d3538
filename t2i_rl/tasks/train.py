"""`task=train`: evaluate the base, train, evaluate again, and write it all down."""

from pathlib import Path

from hydra.utils import get_class, instantiate
from rich.console import Console

from t2i_rl.callbacks.no_spread import NoSpread
from t2i_rl.callbacks.validation import Validate
from t2i_rl.command.checks import draws_in_turns, learns_from_prompts, watched
from t2i_rl.core.recipes import recipe_of
from t2i_rl.data.base import check_data
from t2i_rl.evaluation.report.html import write_report
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.evaluation.tables import before_after_table, headline
from t2i_rl.methods.irg.tables import turn_tables
from t2i_rl.rewards.processors import image_processors
from t2i_rl.tasks.loggers import build_loggers, log_results
from t2i_rl.tasks.named_parts import named_parts
from t2i_rl.tasks.part_checks import (
    announce_model,
    check_needs,
    check_parts,
    check_share,
    check_validation,
    made_judge,
)


def run(cfg) -> dict:
    """Train `cfg.method` on `cfg.model` with `cfg.reward`; returns the content of results.json."""
    out = Path(cfg.paths.output_dir)
    benchmark, data = instantiate(cfg.benchmark), instantiate(cfg.data)
    check_data(data)
    check_needs(cfg, data.prompts)
    announce_model(cfg, data.texts())
    reward = instantiate(cfg.reward)
    watch = {name: judge for name, judge in instantiate(watched(cfg)).items() if judge is not None}
    judges = {"reward": reward, **{f"watch.{name}": judge for name, judge in watch.items()}}
    check_parts(cfg, benchmark, data.prompts, judges)
    data.check(get_class(cfg.model._target_).image_size(cfg.model))
    callbacks = named_parts(cfg, "callbacks")
    check_validation(cfg, callbacks, data.validation)
    trainer = instantiate(cfg.trainer, callbacks=list(callbacks.values()), logger=build_loggers(cfg))
    check_share(data, trainer.world_size)
    judge = made_judge(cfg, benchmark.prompts(), benchmark.name)
    model = instantiate(cfg.model)
    method = build_method(cfg, model, judge, reward, watch)
    turns = getattr(method, "turns", None)
    stages = Stages(
        trainer, model, benchmark, out / "evaluation", cfg.evaluation.seed, cfg.evaluation.batch_size, turns
    )

    for stage in cfg.evaluation.stages:
        if stage.startswith("base"):
            stages.draw(stage)
    trainer.fit(method, data, ckpt_path=cfg.ckpt_path, weights_only=True)
    steps = trainer.global_step
    for stage in cfg.evaluation.stages:
        if stage.startswith("trained"):
            stages.draw(stage)

    for name, callback in callbacks.items():
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
            for table in [before_after_table(results), *turn_tables(results)]:
                console.print(table)
        console.print(headline(results))
        console.print(f"report: {write_report(out)}", soft_wrap=True)
    return results


def build_method(cfg, model, judge=None, reward=None, watch: dict | None = None):
    """`cfg.method` on a model; what learns from given pictures has no reward and watches none. Where nothing is trained, rewards need not load."""
    parts = {"judge": judge} if draws_in_turns(cfg) else {}
    if learns_from_prompts(cfg):
        parts |= {"reward": reward, "watch": watch or {}}
    method = instantiate(cfg.method, model=model, **parts)
    method.recipe = recipe_of(cfg, method.decide_what_learns)
    return method
