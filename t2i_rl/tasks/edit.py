"""`task=edit`: FlowEdit on Stable Diffusion 3: one picture, or a suite of `shapes` edits with known answers."""

import json
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image
from rich.console import Console

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import write_atomic
from t2i_rl.core.pixels import read_image, square, to_bytes, write_png
from t2i_rl.core.progress import tracked
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.report.grid import caption_grid
from t2i_rl.evaluation.stats import bracket, seed_interval, wilson
from t2i_rl.models.diffusion.flow_edit import check_flow, flow_edit
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.shapes.edits import KINDS, psnr, sample_edit
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.render import render, to_pixels
from t2i_rl.tasks.evaluate import load_trained
from t2i_rl.tasks.examine import announce_model, check_method, model_of

FLOW = ("steps", "start", "source_guidance", "target_guidance", "average", "convention")


def check(cfg) -> None:
    """Refuse what cannot be edited with.

    Raises:
        UserError: another kind of model, half of what one picture needs, or settings of no flow.
    """
    if not issubclass(model_of(cfg), SD3):
        raise UserError(f"task=edit needs a flow-matching model (model=sd3_tiny, sd3), not {model_of(cfg).__name__}")
    if cfg.image and not (cfg.prompt and cfg.task.source):
        raise UserError('task=edit takes image=<file> task.source="what it shows" prompt="what it shall show"')
    check_flow(**{name: cfg.task[name] for name in ("steps", "start", "average", "convention")})
    if cfg.ckpt_path:
        check_method(cfg, training=False)


def run(cfg) -> dict:
    """Edit `cfg.image` from `cfg.task.source` to `cfg.prompt`.

    With neither, `cfg.task.cases` edits of each kind, judged by the oracle.

    Raises:
        UserError: a picture that cannot be read.
    """
    out = Path(cfg.paths.output_dir)
    picture = read_image(cfg.image, f"image={cfg.image}") if cfg.image else None
    if cfg.image:
        announce_model(cfg, [cfg.task.source, cfg.prompt])
    model = instantiate(cfg.model).requires_grad_(False)
    if cfg.ckpt_path:
        load_trained(cfg, model)
    if picture is not None:
        return edit_one(cfg, model, picture, out)
    return edit_suite(cfg, model, out)


def edit_one(cfg, model: SD3, picture: Image.Image, out: Path) -> dict:
    image = square(picture, model.size)
    edited = edit(cfg, model, image[None], [cfg.task.source], [cfg.prompt], [cfg.seed])[0]
    write_png(out / "edited.png", edited)
    grid = caption_grid([image, edited], [cfg.task.source, cfg.prompt], columns=2, scale=max(1, 256 // model.size))
    write_png(out / "strip.png", grid)
    Console().print(f"edited: {out / 'edited.png'}, before and after: {out / 'strip.png'}", soft_wrap=True)
    return {"image": str(out / "edited.png")}


def edit_suite(cfg, model: SD3, out: Path) -> dict:
    """Records, a summary with intervals, and a strip a kind."""
    records = []
    for kind in KINDS:
        rng = np.random.default_rng(derive_seed(cfg.seed, "edits", kind))
        cases = [sample_edit(kind, rng, model.size) for _ in range(cfg.task.cases)]
        before = np.stack([render(case.scene) for case in cases])
        after = []
        for first in tracked(range(0, len(cases), cfg.evaluation.batch_size), kind, "batch"):
            part = slice(first, first + cfg.evaluation.batch_size)
            seeds = [derive_seed(cfg.seed, kind, number) for number in range(len(cases))[part]]
            sources, targets = [case.source for case in cases[part]], [case.target for case in cases[part]]
            after.append(edit(cfg, model, before[part], sources, targets, seeds))
        after = np.concatenate(after)
        for case, old, new, objects in zip(cases, before, after, detect(after), strict=True):
            verdict = judge(case.meta, objects)
            records.append(
                {
                    "kind": kind,
                    "source": case.source,
                    "target": case.target,
                    "strict": verdict.strict,
                    "score": verdict.score,
                    "defects": [defect.text for defect in verdict.defects],
                    "psnr_kept": psnr(old, new, case.kept),
                }
            )
        pictures = [picture for row in zip(before[:4], after[:4], strict=True) for picture in row]
        captions = [words for case in cases[:4] for words in (case.source, f"-> {case.target}")]
        grid = caption_grid(pictures, captions, columns=4, scale=max(1, 128 // model.size))
        write_png(out / f"{kind}.png", grid)
    summary = {kind: summarise([row for row in records if row["kind"] == kind]) for kind in KINDS}
    write_atomic(out / "edits.jsonl", "".join(json.dumps(row) + "\n" for row in records))
    results = {
        "task": "edit",
        "seed": cfg.seed,
        "sampling": model.sampling(),
        "flow": {name: cfg.task[name] for name in FLOW},
        "kinds": summary,
    }
    write_atomic(out / "edits.json", json.dumps(results, indent=1))
    for kind, row in summary.items():
        mean, low, high = (100 * row["strict"][end] for end in ("mean", "low", "high"))
        Console().print(
            f"{kind}: as asked {mean:.1f} % [{low:.1f}, {high:.1f}], "
            f"kept pixels {row['psnr_kept']['mean']:.1f} dB {bracket(row['psnr_kept'])}, n={row['strict']['n']}"
        )
    Console().print(f"pictures and records: {out}", soft_wrap=True)
    return results


def summarise(rows: list[dict]) -> dict:
    """Wilson's interval of the verdict, Student's of the PSNR's mean."""
    similarity = seed_interval([row["psnr_kept"] for row in rows])
    if similarity["low"] is None:
        similarity["no_interval"] = "no interval"  # these are cases, not seeds
    return {"strict": wilson(sum(row["strict"] for row in rows), len(rows)), "psnr_kept": similarity}


@torch.no_grad()
def edit(cfg, model: SD3, images: np.ndarray, source: list[str], target: list[str], seeds: list[int]) -> np.ndarray:
    """uint8 images `(B, H, W, 3)` to edited ones; the latents edited are the posterior's mean."""
    mean, _ = model.posterior(to_pixels(images))
    latents = flow_edit(model, model.scaled(mean), source, target, seeds, **{name: cfg.task[name] for name in FLOW})
    return to_bytes(model.decode_latents(latents), centred=True)
