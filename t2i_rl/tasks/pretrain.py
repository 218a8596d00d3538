"""`task=pretrain`: make a shipped tiny model, stage by stage, from nothing or from weights, and measure it."""

import time
from pathlib import Path
from types import ModuleType

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console

from t2i_rl.callbacks.progress import Progress
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import write_atomic
from t2i_rl.core.numbers import Positive, Whole, check_value
from t2i_rl.evaluation.drawer import Drawer
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.pretrain import make_diffusion, make_janus
from t2i_rl.pretrain.card import card, facts


def check(cfg) -> None:
    """Refuse a model that has no recipe.

    Raises:
        UserError: it has none; the line names those that have.
    """
    if Path(cfg.model.path).name not in cfg.task.recipes:
        raise UserError(
            f"task=pretrain makes model={', '.join(cfg.task.recipes)}; the other models are loaded, not made"
        )


def run(cfg) -> dict:
    """Train every stage, resuming whatever the output folder already holds; save the checkpoint, its figures, its card.

    Raises:
        UserError: see `train`.
    """
    name, out, started = Path(cfg.model.path).name, Path(cfg.paths.output_dir), time.time()
    recipe, folder, maker = cfg.task.recipes[name], out / name, maker_of(cfg)
    model, minutes = train(cfg)
    figures = maker.figures(model)
    trainer = instantiate(cfg.trainer, callbacks=[Progress()], logger=False)
    benchmark, evaluation = instantiate(cfg.benchmark), cfg.evaluation
    stages = Stages(trainer, Drawer(model), benchmark, out / "evaluation", evaluation.seed, evaluation.batch_size)
    for stage in maker.STAGES:
        stages.draw(stage)
    results = write_summary(cfg, stages, steps=0, extra={"figures": [list(row) for row in figures]})
    made = facts(name, cfg.seed, minutes, model, list(folder.rglob("*.safetensors")), cfg.task.initial_weights)
    about = maker.ABOUT
    if name != "janus_tiny":
        absent = ", text_encoder_3=None, tokenizer_3=None" if name == "sd3_tiny" else ""
        about = about.format(pipeline=type(model.pipe).__name__, absent=absent)
    text = card(
        name,
        maker.LIBRARY,
        about,
        OmegaConf.to_yaml(recipe, resolve=True),
        figures,
        maker.settings(results["sampling"]),
        results,
        made,
    )
    write_atomic(folder / "README.md", text)
    Console().print(
        f"checkpoint and card: {folder} ({(time.time() - started) / 60:.0f} minutes in this session)", soft_wrap=True
    )
    return results


def train(cfg) -> tuple[torch.nn.Module, float]:
    """The model of `cfg`, trained and saved beside the other files of its run; and the minutes that this took.

    Raises:
        UserError: `task.workers` or `task.minutes` is no such number, or minutes are given without weights to go on
            from: an autoencoder's rate falls by steps and cannot end by the clock.
    """
    check_value(cfg.task.workers, Whole, "task.workers")
    check_value(cfg.task.minutes, Positive | None, "task.minutes")
    check_value(cfg.task.initial_weights, str | None, "task.initial_weights")
    if cfg.task.minutes is not None and cfg.task.initial_weights is None:
        raise UserError(
            "task.minutes is for going on from weights: give task.initial_weights=<folder>, or leave the minutes out"
        )
    name = Path(cfg.model.path).name
    return maker_of(cfg).make(cfg, cfg.task.recipes[name], Path(cfg.paths.output_dir) / name)


def maker_of(cfg) -> ModuleType:
    """The module that makes the model of `cfg`."""
    return make_janus if Path(cfg.model.path).name == "janus_tiny" else make_diffusion
