"""janus_tiny from nothing: VQ autoencoder, then the language model on plans, images and looking, then its habits (slips in plans) and its eyes."""

from functools import partial
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from t2i_rl.core.files import replacing_folder
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.autoregressive.janus_tiny import build_model, build_processor
from t2i_rl.pretrain.card import percent
from t2i_rl.pretrain.fit import fit
from t2i_rl.pretrain.janus_lm import JanusLMStage, JanusLookStage, PretrainRows
from t2i_rl.pretrain.measure import look_figures, plan_figures, vq_figures
from t2i_rl.pretrain.vq import SceneImages, VQStage

LIBRARY = "transformers"
STAGES = ("base_direct", "base_plan")
ABOUT = """transformers' own `JanusForConditionalGeneration` (language model, generation head, VQ model, understanding tower) trained from nothing on
the embedded world `shapes`. It is a test bench, not a picture model: an effect seen on it is evidence about the implementation of an
algorithm, not about Janus-Pro."""


def make(cfg, recipe, folder: Path) -> tuple[Janus, float]:
    """Train every stage beside `folder`, save the checkpoint into it; returns the model loaded from there and the minutes of training."""
    out = folder.parent
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
    with replacing_folder(folder) as temporary:
        model.eval().half().save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return instantiate(cfg.model, path=str(folder)), minutes


def figures(janus: Janus) -> list[tuple[str, str, str]]:
    """Each stage's figures, as rows of the card."""
    vq, plans, look = vq_figures(janus), plan_figures(janus), look_figures(janus)
    return [
        ("VQ reconstruction", "PSNR", f"{vq['psnr_db']:.1f} dB"),
        ("", f"oracle reads the same objects (n={vq['oracle_agreement']['n']})", percent(vq["oracle_agreement"])),
        ("", "codes in use", f"{vq['codes_used']} of {vq['codes']}"),
        ("plan text", f"names exactly what the test prompt asks (n={plans['names_what_is_asked']['n']})", percent(plans["names_what_is_asked"])),
        ("image understanding", f"objects read exactly (n={look['objects_exact']['n']})", percent(look["objects_exact"])),
        ("", "whole description word for word", percent(look["description_exact"])),
    ]  # fmt: skip


def settings(sampling: dict) -> str:
    return f"guidance {sampling['guidance_scale']}, temperature {sampling['temperature']}"
