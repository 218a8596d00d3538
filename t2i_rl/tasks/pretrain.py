"""Make janus_tiny from nothing: VQ autoencoder, then the language model on plans, images and looking; then measure it."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from t2i_rl.models.janus import Chat
from t2i_rl.models.janus_tiny import build_model, build_processor
from t2i_rl.pretrain.janus_lm import JanusLMStage, PretrainRows
from t2i_rl.pretrain.vq import SceneImages, VQStage


def run(cfg) -> dict:
    """Train every stage, resuming whatever the output folder already holds."""
    recipe, out = cfg.model.pretrain, Path(cfg.paths.output_dir)
    L.seed_everything(cfg.seed, verbose=False)
    model, processor = build_model(**recipe.architecture), build_processor(recipe.architecture.image_size)
    vq = VQStage(model.model.vqmodel, lr=recipe.vq.lr)
    fit(vq, lambda first: SceneImages(recipe.vq.batch_size, cfg.seed, first), recipe.vq.steps, out / "vq", "32-true")

    L.seed_everything(cfg.seed, verbose=False)
    model.model.language_model.set_attn_implementation("eager")
    chat = Chat(cfg.model.chat.system, cfg.model.chat.instruction)
    lm = JanusLMStage(model, **recipe.lm.optimizer)
    rows = lambda first: PretrainRows(processor.tokenizer, chat, dict(recipe.lm.batch), cfg.seed, first)  # noqa: E731
    fit(lm, rows, recipe.lm.steps, out / "lm", recipe.lm.precision, optimizers=2)

    folder = out / "janus_tiny"
    model.eval().half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"folder": str(folder)}


def fit(module: L.LightningModule, stream, steps: int, folder: Path, precision: str, optimizers: int = 1) -> None:
    """Train one stage for `steps` batches, continuing from `folder/last.ckpt` where there is one; `stream(first_batch)` feeds it."""
    last = folder / "last.ckpt"
    done = torch.load(last, weights_only=True)["global_step"] // optimizers if last.exists() else 0
    if done >= steps:
        module.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
        return
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps * optimizers,
        precision=precision,
        gradient_clip_val=1.0 if module.automatic_optimization else None,
        logger=L.pytorch.loggers.CSVLogger(folder, name="", version=""),
        log_every_n_steps=10,
        callbacks=[ModelCheckpoint(folder, filename="last", every_n_train_steps=200, enable_version_counter=False)],
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(stream(done), batch_size=None), ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(last)
