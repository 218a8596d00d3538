"""`task=make_preferences`: draw each training prompt several times, and keep a right picture beside a wrong one."""

import json
from pathlib import Path

from hydra.utils import instantiate
from rich.console import Console

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import write_atomic
from t2i_rl.core.pixels import write_png
from t2i_rl.core.progress import tracked
from t2i_rl.core.ranks import own_gpu
from t2i_rl.core.seeding import derive_seed
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.suites import select_prompts


def check(cfg) -> None:
    """Refuse a folder that has preferences.

    Raises:
        UserError: it has.
    """
    if (Path(cfg.task.out) / "preferences.jsonl").exists():
        raise UserError(f"task.out={cfg.task.out} holds preferences already: name another folder")


def run(cfg) -> dict:
    """Write `preferences.jsonl` and its pictures into `cfg.task.out`.

    A prompt whose pictures all score alike gives none.
    """
    out = Path(cfg.task.out)
    model = instantiate(cfg.model).requires_grad_(False)
    model.to(own_gpu())
    prompts = select_prompts("train", cfg.task.prompts_per_task)
    work = [(prompt, sample) for prompt in prompts for sample in range(cfg.task.samples)]
    (out / "images").mkdir(parents=True, exist_ok=True)
    scores: dict[str, list[tuple[float, str]]] = {prompt.text: [] for prompt in prompts}
    size = cfg.evaluation.batch_size
    for first in tracked(range(0, len(work), size), "drawing", "batch"):
        part = work[first : first + size]
        seeds = [derive_seed(cfg.seed, "preferences", prompt.text, sample) for prompt, sample in part]
        images = model.generate([prompt.text for prompt, _ in part], seeds).images
        for number, ((prompt, _), image, objects) in enumerate(zip(part, images, detect(images), strict=True)):
            name = f"images/{first + number:06d}.png"
            write_png(out / name, image)
            scores[prompt.text].append((judge(prompt.meta, objects).score, name))
    rows = []
    for text, drawn in scores.items():
        (best, preferred), (worst, other) = max(drawn), min(drawn)
        if best > worst:
            rows.append({"prompt": text, "preferred": preferred, "other": other, "scores": [best, worst]})
    write_atomic(out / "preferences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    Console().print(
        f"{len(rows)} preferences of {len(prompts)} prompts: {out}   (data=preferences data.path={out})", soft_wrap=True
    )
    return {"preferences": len(rows), "folder": str(out)}
