"""`task=evaluate`: measure a model, direct and with a plan; with `ckpt_path` the trained one beside its base."""

from pathlib import Path

from hydra.utils import instantiate
from rich.console import Console

from t2i_rl.callbacks.progress import Progress
from t2i_rl.command.checks import draws_in_turns
from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.report.html import write_report
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.evaluation.tables import before_after_table
from t2i_rl.methods.identity import about
from t2i_rl.methods.irg.tables import turn_tables
from t2i_rl.tasks.part_checks import check_parts, made_judge
from t2i_rl.tasks.train import build_method


def run(cfg) -> dict:
    """Evaluate `cfg.model`; with a checkpoint of `cfg.method`, evaluate that too. Returns the content of results.json."""
    out = Path(cfg.paths.output_dir)
    benchmark = instantiate(cfg.benchmark)
    check_parts(cfg, benchmark, [], {})
    judge = made_judge(cfg, benchmark.prompts(), benchmark.name)
    model = instantiate(cfg.model)
    trainer = instantiate(cfg.trainer, callbacks=[Progress()], logger=False)
    method = build_method(cfg, model, judge) if draws_in_turns(cfg) else None
    turns = method.turns if method else None
    stages = Stages(
        trainer, model, benchmark, out / "evaluation", cfg.evaluation.seed, cfg.evaluation.batch_size, turns
    )
    before, after = stages_to_draw(list(cfg.evaluation.stages), method is not None)
    if not before and not cfg.ckpt_path:
        raise UserError(
            "there is nothing to evaluate: give ckpt_path=<checkpoint>, or a stage of the base (evaluation.stages=[base_turns])"
        )
    for stage in before:
        stages.draw(stage)
    steps, settings = 0, None
    if cfg.ckpt_path:
        steps = method.load(cfg.ckpt_path) if method else load_trained(cfg, model)
        settings = settings_of_checkpoint(cfg.ckpt_path)
        for stage in after:
            stages.draw(stage)
    results = write_summary(cfg, stages, steps, settings)
    if trainer.is_global_zero:
        console = Console()
        for table in [before_after_table(results), *turn_tables(results)]:
            console.print(table)
        console.print(f"report: {write_report(out)}", soft_wrap=True)
    return results


def stages_to_draw(named: list[str], in_turns: bool) -> tuple[list[str], list[str]]:
    """Stages of the base, and of the trained model where there is one: each way of drawing that is named, both sides of it; a method that draws in turns is
    compared with what its base is able to, so there the named ones are meant as they are."""
    if in_turns:
        sides = [[stage for stage in named if stage.startswith(side)] for side in ("base", "trained")]
        return sides[0], sides[1]
    modes = dict.fromkeys(stage.split("_")[1] for stage in named)
    return [f"base_{mode}" for mode in modes], [f"trained_{mode}" for mode in modes]


def load_trained(cfg, model) -> int:
    """Put a checkpoint's weights into `model`; returns the optimizer step it was saved at.

    Raises:
        UserError: it is no checkpoint of `cfg.method` on this model.
    """
    return build_method(cfg, model).load(cfg.ckpt_path)


def settings_of_checkpoint(path: str) -> dict | None:
    """The method's settings as it was trained, which a command that measures it does not repeat; None where the
    checkpoint does not say."""
    return about(read_checkpoint(path)).get("settings")
