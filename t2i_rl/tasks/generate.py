"""`task=generate`: images for one prompt or a file of prompts, base model or a checkpoint."""

import json
from pathlib import Path

from hydra.utils import instantiate
from rich.console import Console

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import write_atomic
from t2i_rl.core.pixels import write_png
from t2i_rl.core.progress import tracked
from t2i_rl.core.prompts import Prompt, read_prompts
from t2i_rl.core.ranks import own_gpu
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.report.grid import caption_grid
from t2i_rl.tasks import generate_turns
from t2i_rl.tasks.evaluate import load_trained
from t2i_rl.tasks.examine import announce_model, check_drawing, check_method, made_judge, method_of


def check(cfg) -> None:
    """Refuse what cannot be drawn.

    Raises:
        UserError: one line that says what to give or to change.
    """
    in_turns = method_of(cfg).draws_in_turns
    if bool(str(cfg.prompt or "").strip()) == bool(cfg.prompts_file):
        raise UserError('task=generate takes one of prompt="three red circles" or prompts_file=<file>')
    modes = ("turns",) if in_turns else ("plan", "direct")
    if cfg.mode not in modes:
        raise UserError(f"mode must be {' or '.join(modes)}, not {cfg.mode!r}")
    if cfg.ckpt_path or in_turns:
        check_method(cfg, training=False)
    check_drawing(cfg)


def run(cfg) -> dict:
    """Draw `cfg.num_images` images a prompt into the run's folder: PNGs, `images.jsonl`, and one captioned grid."""
    prompts = [Prompt("prompt", str(cfg.prompt))] if str(cfg.prompt or "").strip() else read_prompts(cfg.prompts_file)
    judge = made_judge(cfg, prompts, judged_by=None)
    announce_model(cfg, [prompt.text for prompt in prompts])
    model = instantiate(cfg.model)
    if cfg.mode == "turns":
        return generate_turns.run(cfg, model.to(own_gpu()), judge, prompts)
    if cfg.ckpt_path:
        load_trained(cfg, model)
    model.to(own_gpu())
    out, rows, images = Path(cfg.paths.output_dir), [], []
    (out / "images").mkdir(parents=True, exist_ok=True)
    work = [(prompt, sample) for prompt in prompts for sample in range(cfg.num_images)]
    size = cfg.evaluation.batch_size
    for first in tracked(range(0, len(work), size), "drawing", "batch"):
        batch = work[first : first + size]
        seeds = [derive_seed(cfg.seed, "generate", prompt.text, sample) for prompt, sample in batch]
        drawn = model.generate([prompt.text for prompt, _ in batch], seeds, mode=cfg.mode)
        for row, (prompt, sample) in enumerate(batch):
            name = f"images/{len(rows):05d}.png"
            write_png(out / name, drawn.images[row])
            rows.append(
                {"prompt": prompt.text, "sample": sample, "seed": seeds[row], "plan": drawn.plans[row], "image": name}
            )
            images.append(drawn.images[row])
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(out / "images.jsonl", lines)  # after every batch, so that a stop keeps what is drawn
    shown = rows[:64]
    captions = [f"{row['prompt']} | {row['plan']}" if row["plan"] else row["prompt"] for row in shown]
    grid = caption_grid(
        images[: len(shown)], captions, columns=min(4, len(shown)), scale=max(1, 192 // images[0].shape[0])
    )
    write_png(out / "grid.png", grid)
    Console().print(f"{len(rows)} images in {out / 'images'}, a grid in {out / 'grid.png'}", soft_wrap=True)
    return {"images": len(rows), "folder": str(out)}
