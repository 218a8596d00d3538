"""`task=pretrain`: make a shipped tiny model from nothing, stage by stage, and measure it."""

import time
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console

from t2i_rl.callbacks.progress import Progress
from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.pretrain.card import card, facts


def run(cfg) -> dict:
    """Train every stage, resuming whatever the output folder already holds; save the checkpoint, its figures and its card."""
    name, out, started = Path(cfg.model.path).name, Path(cfg.paths.output_dir), time.time()
    recipe, folder = cfg.task.recipes[name], out / name
    if name == "janus_tiny":
        from t2i_rl.pretrain import make_janus as maker
    else:
        from t2i_rl.pretrain import make_diffusion as maker
    model, minutes = maker.make(cfg, recipe, folder)

    figures = maker.figures(model)
    trainer = instantiate(cfg.trainer, callbacks=[Progress()], logger=False)
    stages = Stages(
        trainer, model, instantiate(cfg.benchmark), out / "evaluation", cfg.evaluation.seed, cfg.evaluation.batch_size
    )
    for stage in maker.STAGES:
        stages.draw(stage)
    results = write_summary(cfg, stages, steps=0, extra={"figures": [list(row) for row in figures]})
    made = facts(name, cfg.seed, minutes, model, list(folder.rglob("*.safetensors")))
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
