"""`task=generate method=irg`: think, draw, look, reflect, draw better; a folder a trajectory, and a page of strips."""

import json
from html import escape
from pathlib import Path

from rich.console import Console

from t2i_rl.core.files import write_atomic
from t2i_rl.core.progress import tracked
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.report.page import definitions, page, section
from t2i_rl.evaluation.report.thumbnails import FIGURE, picture_html
from t2i_rl.methods.irg.evaluation import judging
from t2i_rl.methods.irg.files import save_trajectory
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.tasks.train import build_method

SHOWN = 64


def run(cfg, model, judge, prompts: list[Prompt]) -> dict:
    """Draw `cfg.num_images` trajectories a prompt into the run's folder.

    Writes `trajectories/<number>/`, `images.jsonl` and `report.html`.
    """
    method, out, console = build_method(cfg, model, judge), Path(cfg.paths.output_dir), Console()
    if cfg.ckpt_path:
        method.load(cfg.ckpt_path)
    elif not cfg.method.get("start_from"):
        untrained = f"no ckpt_path: {model.path} draws as it is"
        console.print(
            f"{untrained}; Janus and janus_tiny have not learnt to reflect, which method=irg teaches", soft_wrap=True
        )
    method.interleaved.to(model.device).prepare()
    work = [(prompt, sample) for prompt in prompts for sample in range(cfg.num_images)]
    rows, shown, size = [], [], cfg.evaluation.batch_size
    for first in tracked(range(0, len(work), size), "drawing", "batch"):
        batch = work[first : first + size]
        seeds = [derive_seed(cfg.seed, "generate", prompt.text, sample) for prompt, sample in batch]
        judged = judging(judge, [prompt for prompt, _ in batch], seeds)
        drawn = method.interleave.run(method.interleaved, [prompt.text for prompt, _ in batch], seeds, judged)
        for (prompt, sample), trajectory in zip(batch, drawn, strict=True):
            trajectory.settings |= {"model": model.path, "ckpt_path": cfg.ckpt_path, "cues": method.interleaved.cues}
            name = f"trajectories/{len(rows):05d}"
            save_trajectory(out / name, trajectory)
            rows.append(row_of(prompt, sample, trajectory, name))
            shown += [(prompt.text, trajectory, out / name / "strip.png")] * (len(shown) < SHOWN)
    write_atomic(out / "images.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_atomic(out / "report.html", strips_page(shown, rows, out))
    console.print(
        f"{len(rows)} trajectories in {out / 'trajectories'}, strips in {out / 'report.html'}", soft_wrap=True
    )
    cut = sum(map(sum, (row["unfinished"] for row in rows)))
    if cut:
        tries = f"{method.interleave.max_tokens} tokens in {method.interleave.retries + 1} tries"
        console.print(
            f"{cut} texts did not end within {tries} and were kept as they are: method.interleave.max_tokens, .retries",
            soft_wrap=True,
        )
    return {"trajectories": len(rows), "folder": str(out)}


def row_of(prompt: Prompt, sample: int, trajectory: Trajectory, name: str) -> dict:
    """One line of images.jsonl."""
    images = [f"{name}/turn{turn + 1}.png" for turn in range(len(trajectory.images))]
    return {
        "prompt": prompt.text,
        "sample": sample,
        "seed": trajectory.seed,
        "texts": trajectory.texts,
        "images": images,
        "answer": images[trajectory.answer],
        "scores": trajectory.scores,
        "text_tokens": trajectory.text_tokens,
        "unfinished": trajectory.unfinished,
        "seconds": trajectory.seconds,
        "trajectory": f"{name}/trajectory.json",
    }


def strips_page(shown: list[tuple[str, Trajectory, Path]], rows: list[dict], folder: Path) -> str:
    """Strips below one another, and how the trajectories ended; the page lies in `folder`."""
    turns = [len(row["images"]) for row in rows]
    facts = {
        "trajectories": len(rows),
        "pictures a trajectory": f"{sum(turns) / len(turns):.2f}",
        "tokens of text a trajectory": f"{sum(sum(row['text_tokens']) for row in rows) / len(rows):.1f}",
        "seconds a trajectory": f"{sum(sum(row['seconds']) for row in rows) / len(rows):.2f} (a batch's, shared out)",
        "texts that did not end": sum(sum(row["unfinished"]) for row in rows),
    }
    strips = "".join(
        f'<div class="set figure"><h3>{escape(prompt)}</h3>{picture_html(path, folder, prompt, FIGURE)}</div>'
        for prompt, _, path in shown
    )
    note = "Each turn's picture, with what was thought before it below."
    return page("Trajectories", f"<h1>Trajectories</h1>{definitions(facts)}{section('Strips', note, strips)}")
