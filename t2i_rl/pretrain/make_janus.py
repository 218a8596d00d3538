"""janus_tiny from nothing: the VQ autoencoder, the language model, then its habits and its eyes.

The language model learns plans, images and looking; its habits are slips in plans. With
`task.initial_weights` these stages go on from weights that there are.
"""

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
from t2i_rl.pretrain.fit import fit, share_of_minutes
from t2i_rl.pretrain.janus_lm import JanusLMStage, JanusLookStage, PretrainRows
from t2i_rl.pretrain.measure import look_figures, plan_figures, vq_figures
from t2i_rl.pretrain.vq import SceneImages, VQStage

LIBRARY = "transformers"
STAGES = ("base_direct", "base_plan")
LEARNING = ("lm", "habits", "look")  # the stages behind the autoencoder, in turn
ABOUT = (
    "transformers' own `JanusForConditionalGeneration` (language model, generation head, VQ model, "
    "understanding tower) trained from nothing on\n"
    "the embedded world `shapes`. It is a test bench, not a picture model: an effect seen on it is evidence about "
    "the implementation of an\n"
    "algorithm, not about Janus-Pro."
)


def make(cfg, recipe, folder: Path) -> tuple[Janus, float]:
    """Train every stage beside `folder`, and save the checkpoint into it.

    Returns the model loaded from there and the minutes of training. With `task.initial_weights` the
    VQ autoencoder stays as it is there, and the other stages go on from the rest.
    """
    out, workers, processor = folder.parent, cfg.task.workers, build_processor(recipe.architecture.image_size)
    if cfg.task.initial_weights is None:
        model, minutes = untrained(cfg, recipe, out)
    else:
        L.seed_everything(cfg.seed, verbose=False)
        start = {"path": cfg.task.initial_weights, "dtype": "float32", "device": None}
        model, minutes = instantiate(cfg.model, **start).model, 0.0
    model.model.language_model.set_attn_implementation("eager")
    chat = Chat(cfg.model.chat.system, cfg.model.chat.instruction)
    bound = partial(share_of_minutes, cfg.task.minutes, steps_of_all=sum(recipe[name].steps for name in LEARNING))
    for number, name in enumerate(LEARNING, start=2):
        part = recipe[name]
        stage = (JanusLookStage if name == "look" else JanusLMStage)(model, **part.optimizer)
        rows = partial(PretrainRows, processor.tokenizer, chat, (cfg.seed, number), **OmegaConf.to_container(part.rows))
        options = {"optimizers": stage.optimizer_count, "workers": workers, "minutes": bound(part.steps)}
        minutes += fit(stage, rows, part.steps, out / name, part.precision, **options)
    with replacing_folder(folder) as temporary:
        model.eval().half().save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return instantiate(cfg.model, path=str(folder)), minutes


def untrained(cfg, recipe, out: Path) -> tuple[torch.nn.Module, float]:
    """A model with a trained VQ autoencoder and a language model that has learnt nothing; and the first's minutes."""
    L.seed_everything(cfg.seed, verbose=False)
    model = build_model(**recipe.architecture)
    vq = VQStage(model.model.vqmodel, lr=recipe.vq.lr)
    images = partial(SceneImages, recipe.vq.batch_size, cfg.seed)
    minutes = fit(vq, images, recipe.vq.steps, out / "vq", "32-true", workers=cfg.task.workers)
    L.seed_everything(cfg.seed, verbose=False)
    with torch.no_grad():
        model.model.generation_embeddings.weight.copy_(model.model.vqmodel.quantize.embedding.weight)
    return model, minutes


def figures(janus: Janus) -> list[tuple[str, str, str]]:
    """Each stage's figures, as rows of the card."""
    vq, plans, look = vq_figures(janus), plan_figures(janus), look_figures(janus)
    agreement, named, objects = vq["oracle_agreement"], plans["names_what_is_asked"], look["objects_exact"]
    return [
        ("VQ reconstruction", "PSNR", f"{vq['psnr_db']:.1f} dB"),
        ("", f"oracle reads the same objects (n={agreement['n']})", percent(agreement)),
        ("", "codes in use", f"{vq['codes_used']} of {vq['codes']}"),
        ("plan text", f"names exactly what the test prompt asks (n={named['n']})", percent(named)),
        ("image understanding", f"objects read exactly (n={objects['n']})", percent(objects)),
        ("", "whole description word for word", percent(look["description_exact"])),
    ]


def settings(sampling: dict) -> str:
    return f"guidance {sampling['guidance_scale']}, temperature {sampling['temperature']}"
