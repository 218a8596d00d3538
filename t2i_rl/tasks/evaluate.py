"""`task=evaluate`: measure a model, direct and with a plan; with `ckpt_path` the trained one beside its base."""

from pathlib import Path

from hydra.utils import instantiate
from rich.console import Console

from t2i_rl.callbacks.progress import Progress
from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.report.html import write_report
from t2i_rl.evaluation.stage import SIDES, Stage
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.evaluation.tables import run_tables
from t2i_rl.methods.identity import about
from t2i_rl.tasks.examine import check_drawing, check_method, check_parts, made_judge, method_of
from t2i_rl.tasks.train import build_method


def check(cfg) -> None:
    """Refuse what cannot be drawn.

    Raises:
        UserError: one line that says what to change.
    """
    if cfg.ckpt_path or method_of(cfg).draws_in_turns:
        check_method(cfg, training=False)
    check_drawing(cfg)


def run(cfg) -> dict:
    """Evaluate `cfg.model`; with a checkpoint of `cfg.method`, evaluate that too.

    Returns:
        The content of results.json.
    """
    out = Path(cfg.paths.output_dir)
    benchmark = instantiate(cfg.benchmark)
    check_parts(cfg, benchmark, [], {})
    judge = made_judge(cfg, benchmark.prompts(), benchmark.name)
    model = instantiate(cfg.model)
    trainer = instantiate(cfg.trainer, callbacks=[Progress()], logger=False)
    method = build_method(cfg, model, judge) if method_of(cfg).draws_in_turns else None
    evaluation, drawer = cfg.evaluation, method_of(cfg).drawer(model, method)
    stages = Stages(trainer, drawer, benchmark, out / "evaluation", evaluation.seed, evaluation.batch_size)
    before, after = stages_to_draw(list(evaluation.stages), method is not None)
    if not before and not cfg.ckpt_path:
        raise UserError(
            "there is nothing to evaluate: give ckpt_path=<checkpoint>, or a stage of the base "
            "(evaluation.stages=[base_turns])"
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
        for table in run_tables(results):
            console.print(table)
        console.print(f"report: {write_report(out)}", soft_wrap=True)
    return results


def stages_to_draw(named: list[str], in_turns: bool) -> tuple[list[str], list[str]]:
    """Stages of the base, and of the trained model where there is one.

    Each way of drawing that is named is drawn on both sides. A method that draws in turns is compared with what its
    base is able to, so there the named stages are meant as they are.
    """
    stages = [Stage.parse(name) for name in named]
    if in_turns:
        base, trained = ([stage.name for stage in stages if stage.side == side] for side in SIDES)
    else:
        ways = dict.fromkeys(stage.way for stage in stages)
        base, trained = ([Stage(side, way).name for way in ways] for side in SIDES)
    return base, trained


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
