"""sd_tiny, sd3_tiny and flux_tiny from nothing: autoencoder, denoiser, and for flux_tiny its one step.

With `task.initial_weights` the denoiser goes on from weights that there are.
"""

import time
from functools import partial
from itertools import islice
from pathlib import Path

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from t2i_rl.benchmarks.shapes import Shapes
from t2i_rl.core.files import replacing_folder
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.pixels import to_bytes
from t2i_rl.core.progress import tracked
from t2i_rl.core.ranks import own_gpu
from t2i_rl.evaluation.stats import wilson
from t2i_rl.models.diffusion.base import LatentDiffusion
from t2i_rl.models.diffusion.tiny import build_flux, build_sd, build_sd3, build_vae
from t2i_rl.pretrain.card import percent
from t2i_rl.pretrain.denoiser import CaptionedScenes, DenoiserStage
from t2i_rl.pretrain.fit import fit, share_of_minutes
from t2i_rl.pretrain.measure import reconstruction_figures
from t2i_rl.pretrain.one_step import OneStepStage, TaughtPairs, guided_ode, teach
from t2i_rl.pretrain.vae import VAEStage, set_scale
from t2i_rl.pretrain.vq import SceneImages
from t2i_rl.shapes.examples import TASK_WEIGHTS
from t2i_rl.shapes.render import to_pixels

LIBRARY = "diffusers"
BUILDERS = {"sd": build_sd, "sd3": build_sd3, "flux": build_flux}
STAGES = ("base_direct",)
ABOUT = (
    "Stock diffusers classes trained from nothing on the embedded world `shapes`: "
    "`{pipeline}.from_pretrained(folder{absent})` loads it. It is a\n"
    "test bench, not a picture model: an effect seen on it is evidence about the implementation of an algorithm, "
    "not about Stable Diffusion."
)


def make(cfg, recipe, folder: Path) -> tuple[LatentDiffusion, float]:
    """Train every stage beside `folder`, and save the pipeline into it.

    Returns the model loaded from there and the minutes of training. With `task.initial_weights` the
    autoencoder stays as it is there, and the other stages go on from the rest.
    """
    out, workers = folder.parent, cfg.task.workers
    stages = [recipe[name] for name in ("denoiser", "one_step") if name in recipe]
    bound = partial(share_of_minutes, cfg.task.minutes, steps_of_all=sum(part.steps for part in stages))
    if cfg.task.initial_weights is None:
        start, minutes = untrained(cfg, recipe, out)
    else:
        start, minutes = cfg.task.initial_weights, 0.0
        L.seed_everything(cfg.seed, verbose=False)
    model = instantiate(cfg.model, path=str(start), dtype="float32", device=None)
    part = recipe.denoiser
    stage = DenoiserStage(model, cfg.seed, **part.optimizer)
    scenes = partial(CaptionedScenes, part.batch_size, TASK_WEIGHTS, cfg.seed)
    options = {"optimizers": stage.optimizer_count, "workers": workers, "minutes": bound(part.steps)}
    minutes += fit(stage, scenes, part.steps, out / "denoiser", part.precision, **options)
    if "one_step" in recipe:
        with replacing_folder(out / "teacher") as temporary:
            model.eval().pipe.save_pretrained(temporary)
        minutes += one_step(model, recipe.one_step, out, cfg.seed, workers, bound(recipe.one_step.steps))
    with replacing_folder(folder) as temporary:
        model.eval().half().pipe.save_pretrained(temporary)
    return instantiate(cfg.model, path=str(folder)), minutes


def untrained(cfg, recipe, out: Path) -> tuple[Path, float]:
    """A folder with a trained autoencoder and a denoiser that has learnt nothing; and the autoencoder's minutes."""
    L.seed_everything(cfg.seed, verbose=False)
    vae = build_vae(recipe.vae.channels)
    images = partial(SceneImages, recipe.vae.batch_size, cfg.seed)
    stage = VAEStage(vae, lr=recipe.vae.lr, kl_weight=recipe.vae.kl_weight)
    minutes = fit(stage, images, recipe.vae.steps, out / "vae", recipe.vae.precision, workers=cfg.task.workers)
    set_scale(vae.eval(), list(islice(SceneImages(64, cfg.seed + 1), 8)), shift=recipe.pipeline != "sd")

    L.seed_everything(cfg.seed, verbose=False)
    pipe = BUILDERS[recipe.pipeline](vae, **OmegaConf.to_container(recipe.architecture))
    with replacing_folder(out / "untrained") as temporary:
        pipe.save_pretrained(temporary)
    return out / "untrained", minutes


def one_step(
    model: LatentDiffusion, recipe, out: Path, seed: int, workers: int = 0, bound: float | None = None
) -> float:
    """Distil a trained flow into one step, in place.

    Returns the minutes that it took; `bound`, also in minutes, counts the student's training alone.
    """
    started, teaching = time.time(), recipe.teacher
    place = out / f"taught_{weights_sha256(model)[:8]}_{teaching.steps}_{teaching.guidance}_{teaching.batch_size}"
    taught = teach(model.eval().to(own_gpu()), place, seed, recipe.precision, **teaching)
    spent = (time.time() - started) / 60
    stage = OneStepStage(model, seed, teaching.guidance, **recipe.optimizer)
    pairs = partial(TaughtPairs, model.latent_shape, taught, seed)
    options = {"optimizers": stage.optimizer_count, "workers": workers, "minutes": bound}
    return spent + fit(stage, pairs, recipe.steps, out / "one_step", recipe.precision, **options)


def figures(model: LatentDiffusion) -> list[tuple[str, str, str]]:
    """Each stage's figures, as rows of the card."""
    draws = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def there_and_back(images: np.ndarray) -> np.ndarray:
        noise = torch.randn(len(images), *model.latent_shape, generator=draws)
        return to_bytes(model.decode_latents(model.encode_images(to_pixels(images), noise)), centred=True)

    found = reconstruction_figures(there_and_back)
    agreement, teacher = found["oracle_agreement"], Path(model.path).parent / "teacher"
    rows = [] if not teacher.exists() else [taught_by(teacher, model)]
    return [
        *rows,
        ("autoencoder, sampled latents", "PSNR", f"{found['psnr_db']:.1f} dB"),
        ("", f"oracle reads the same objects (n={agreement['n']})", percent(agreement)),
    ]


@torch.no_grad()
def taught_by(teacher: Path, student: LatentDiffusion, steps: int = 12, guidance: float = 3.0) -> tuple[str, str, str]:
    """How often the many-step teacher is right on the benchmark's prompts, with one noise for each.

    One step is compared with it.
    """
    model = type(student)(str(teacher), size=student.size, max_sequence_length=student.max_sequence_length)
    benchmark, draws, right = Shapes(samples_per_prompt=1), torch.Generator().manual_seed(0), 0
    prompts = benchmark.prompts()
    for first in tracked(range(0, len(prompts), 64), "the teacher is judged", "batch"):
        part = prompts[first : first + 64]
        noise = torch.randn(len(part), *model.latent_shape, generator=draws)
        pixels = model.decode_latents(guided_ode(model, noise, [prompt.text for prompt in part], steps, guidance))
        right += sum(verdict.strict for verdict in benchmark.judge(to_bytes(pixels / 2 + 0.5), part))
    share = wilson(right, len(prompts))
    return (
        f"teacher, {steps} steps, guidance {guidance}",
        f"strict, all prompts pooled (n={share['n']})",
        percent(share),
    )


def settings(sampling: dict) -> str:
    return f"guidance {sampling['guidance_scale']}, {sampling['steps']} steps of {sampling['scheduler']}"
