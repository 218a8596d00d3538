"""`task=pretrain`: make janus_tiny from nothing: VQ autoencoder, then the language model on plans, images and looking,
then its habits (slips in plans) and its eyes; and measure it."""

import json
import platform
import subprocess
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from rich.console import Console
from torch.utils.data import DataLoader

from t2i_rl.evaluation.results import write_atomic
from t2i_rl.evaluation.stages import Stages, write_summary
from t2i_rl.models.janus import Chat
from t2i_rl.models.janus_tiny import build_model, build_processor
from t2i_rl.pretrain.janus_lm import JanusLMStage, JanusLookStage, PretrainRows
from t2i_rl.pretrain.measure import card, look_figures, plan_figures, vq_figures
from t2i_rl.pretrain.vq import SceneImages, VQStage


def run(cfg) -> dict:
    """Train every stage, resuming whatever the output folder already holds; save the checkpoint, its figures and its card."""
    recipe, out, started = cfg.task.recipe, Path(cfg.paths.output_dir), time.time()
    L.seed_everything(cfg.seed, verbose=False)
    model, processor = build_model(**recipe.architecture), build_processor(recipe.architecture.image_size)
    vq = VQStage(model.model.vqmodel, lr=recipe.vq.lr)
    minutes = fit(
        vq, lambda first: SceneImages(recipe.vq.batch_size, cfg.seed, first), recipe.vq.steps, out / "vq", "32-true"
    )

    L.seed_everything(cfg.seed, verbose=False)
    model.model.language_model.set_attn_implementation("eager")
    chat = Chat(cfg.model.chat.system, cfg.model.chat.instruction)
    with torch.no_grad():
        model.model.generation_embeddings.weight.copy_(model.model.vqmodel.quantize.embedding.weight)
    for number, name in enumerate(("lm", "habits", "look"), start=2):
        part = recipe[name]
        stage = (JanusLookStage if name == "look" else JanusLMStage)(model, **part.optimizer)
        rows = partial(PretrainRows, processor.tokenizer, chat, (cfg.seed, number), **OmegaConf.to_container(part.rows))
        minutes += fit(stage, rows, part.steps, out / name, part.precision, stage.optimizer_count)
    folder = out / "janus_tiny"
    model.eval().half().save_pretrained(folder)
    processor.save_pretrained(folder)

    janus = instantiate(cfg.model, path=str(folder))
    figures = {"vq": vq_figures(janus), "plan": plan_figures(janus), "look": look_figures(janus)}
    trainer = instantiate(cfg.trainer, logger=False)
    stages = Stages(
        trainer, janus, instantiate(cfg.benchmark), out / "evaluation", cfg.evaluation.seed, cfg.evaluation.batch_size
    )
    for stage in ("base_direct", "base_plan"):
        stages.draw(stage)
    results = write_summary(cfg, stages, steps=0, extra={"figures": figures})
    weights = folder / "model.safetensors"
    facts = {
        "command": f"python run.py task=pretrain model=janus_tiny seed={cfg.seed}",
        "seed": cfg.seed,
        "commit": git_commit(),
        "device": f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        "minutes": minutes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": weights.stat().st_size / 1e6,
    }
    write_atomic(folder / "README.md", card(figures, results, {"yaml": OmegaConf.to_yaml(recipe)}, facts))
    Console().print(json.dumps(figures, indent=1))
    Console().print(
        f"checkpoint and card: {folder} ({(time.time() - started) / 60:.0f} minutes in this session)", soft_wrap=True
    )
    return results


def fit(module: L.LightningModule, stream, steps: int, folder: Path, precision: str, optimizers: int = 1) -> float:
    """Train one stage for `steps` batches, continuing from `folder/last.ckpt`; `stream(first_batch)` feeds it. Returns its minutes so far."""
    last, clock = folder / "last.ckpt", folder / "minutes.json"
    done = torch.load(last, weights_only=True)["global_step"] // optimizers if last.exists() else 0
    spent = json.loads(clock.read_text()) if clock.exists() else 0.0
    if done >= steps:
        module.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
        return spent
    started = time.time()
    trainer = L.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_steps=steps * optimizers,
        precision=precision,
        gradient_clip_val=1.0 if module.automatic_optimization else None,
        logger=L.pytorch.loggers.CSVLogger(folder, name="", version=""),
        log_every_n_steps=10,
        callbacks=[ModelCheckpoint(folder, filename="last", every_n_train_steps=200, enable_version_counter=False)],
        enable_model_summary=False,
    )
    trainer.fit(
        module, DataLoader(stream(done), batch_size=None), ckpt_path=last if last.exists() else None, weights_only=True
    )
    trainer.save_checkpoint(last)
    spent += (time.time() - started) / 60
    write_atomic(clock, json.dumps(spent))
    return spent


def git_commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"
