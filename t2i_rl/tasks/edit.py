"""`task=edit`: FlowEdit on Stable Diffusion 3, with or without soft tokens: one picture, or a suite of `shapes` edits with known answers."""

import json
from pathlib import Path

import numpy as np
import torch
from hydra.utils import get_class, instantiate
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from t2i_rl.data.image_text import square
from t2i_rl.errors import UserError
from t2i_rl.evaluation.grid import caption_grid
from t2i_rl.evaluation.results import write_atomic
from t2i_rl.models.flow_edit import check_flow, flow_edit
from t2i_rl.models.sd3 import SD3
from t2i_rl.pretrain.measure import wilson
from t2i_rl.seeding import derive_seed
from t2i_rl.shapes.edits import KINDS, psnr, sample_edit
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.render import render, to_pixels
from t2i_rl.tasks.evaluate import load_trained

FLOW = ("steps", "start", "source_guidance", "target_guidance", "average", "convention")


def run(cfg) -> dict:
    """Edit `cfg.image` from `cfg.task.source` to `cfg.prompt`; or, with neither, `cfg.task.cases` edits of each kind, judged by the oracle.

    Raises:
        UserError: another kind of model, half of what one picture needs, or a picture that cannot be read.
    """
    out, kind = Path(cfg.paths.output_dir), get_class(cfg.model._target_)
    if not issubclass(kind, SD3):
        raise UserError(f"task=edit needs a flow-matching model (model=sd3_tiny, sd3), not {kind.__name__}")
    if cfg.image and not (cfg.prompt and cfg.task.source):
        raise UserError('task=edit takes image=<file> task.source="what it shows" prompt="what it shall show"')
    check_flow(**{name: cfg.task[name] for name in ("steps", "start", "average", "convention")})
    model = instantiate(cfg.model).requires_grad_(False)
    if cfg.ckpt_path:
        load_trained(cfg, model)
    if cfg.image:
        return edit_one(cfg, model, out)
    return edit_suite(cfg, model, out)


def edit_one(cfg, model: SD3, out: Path) -> dict:
    try:
        image = square(Image.open(cfg.image).convert("RGB"), model.size)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"image={cfg.image}: {error}") from error
    edited = edit(cfg, model, image[None], [cfg.task.source], [cfg.prompt], [cfg.seed])[0]
    Image.fromarray(edited).save(out / "edited.png")
    grid = caption_grid([image, edited], [cfg.task.source, cfg.prompt], columns=2, scale=max(1, 256 // model.size))
    grid.save(out / "strip.png")
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
        for first in track(range(0, len(cases), cfg.evaluation.batch_size), description=kind):
            part = slice(first, first + cfg.evaluation.batch_size)
            seeds = [derive_seed(cfg.seed, kind, number) for number in range(len(cases))[part]]
            words = [case.source for case in cases[part]], [case.target for case in cases[part]]
            after.append(edit(cfg, model, before[part], *words, seeds))
        after = np.concatenate(after)
        for case, old, new, found in zip(cases, before, after, detect(after), strict=True):
            verdict = judge(case.meta, found)
            records.append(
                {"kind": kind, "source": case.source, "target": case.target, "strict": verdict.strict, "score": verdict.score,
                 "defects": verdict.defects, "psnr_kept": psnr(old, new, case.kept)}
            )  # fmt: skip
        pictures = [picture for row in zip(before[:4], after[:4], strict=True) for picture in row]
        captions = [words for case in cases[:4] for words in (case.source, f"-> {case.target}")]
        grid = caption_grid(pictures, captions, columns=4, scale=max(1, 128 // model.size))
        grid.save(out / f"{kind}.png")
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
        Console().print(
            f"{kind}: as asked {100 * row['strict']['mean']:.1f} % [{100 * row['strict']['low']:.1f}, {100 * row['strict']['high']:.1f}], "
            f"kept pixels {row['psnr_kept']['mean']:.1f} dB [{row['psnr_kept']['low']:.1f}, {row['psnr_kept']['high']:.1f}], n={row['strict']['n']}"
        )
    Console().print(f"pictures and records: {out}", soft_wrap=True)
    return results


def summarise(rows: list[dict]) -> dict:
    """Wilson's interval of the verdict, a normal one of the PSNR's mean."""
    values = np.array([row["psnr_kept"] for row in rows])
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    kept = {
        "mean": float(values.mean()),
        "low": float(values.mean() - half),
        "high": float(values.mean() + half),
        "n": len(rows),
    }
    return {"strict": wilson(sum(row["strict"] for row in rows), len(rows)), "psnr_kept": kept}


@torch.no_grad()
def edit(cfg, model: SD3, images: np.ndarray, source: list[str], target: list[str], seeds: list[int]) -> np.ndarray:
    """uint8 images `(B, H, W, 3)` to edited ones; the latents edited are the posterior's mean."""
    mean, _ = model.posterior(to_pixels(images))
    latents = flow_edit(model, model.scaled(mean), source, target, seeds, **{name: cfg.task[name] for name in FLOW})
    pixels = model.decode_latents(latents)
    return ((pixels + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
