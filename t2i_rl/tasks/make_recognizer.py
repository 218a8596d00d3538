"""`task=make_recognizer`: train the differentiable recogniser behind `reward=soft_oracle`, and write its card."""

import json
from functools import partial
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from safetensors.torch import save

from t2i_rl.core.files import write_atomic
from t2i_rl.pretrain.card import git_commit, percent
from t2i_rl.pretrain.fit import fit
from t2i_rl.pretrain.recognizer import LabelledScenes, RecognizerStage, agreement
from t2i_rl.shapes.recognizer import Recognizer


def run(cfg) -> dict:
    """Train (resuming what the output folder holds), save and measure.

    Returns:
        Where it lies and how often it is right.
    """
    out, task = Path(cfg.paths.output_dir), cfg.task
    L.seed_everything(cfg.seed, verbose=False)
    stage = RecognizerStage(Recognizer(task.width), task.lr)
    minutes = fit(
        stage, partial(LabelledScenes, task.batch_size, cfg.seed), task.steps, out / "recognizer", task.precision
    )
    recognizer, folder = stage.recognizer.eval(), Path(task.out or out / "recognizer")
    write_atomic(
        folder / "model.safetensors", save({name: value.half() for name, value in recognizer.state_dict().items()})
    )
    write_atomic(folder / "config.json", json.dumps({"width": task.width, "size": recognizer.size}))
    right = agreement(Recognizer.load(folder))
    parameters = sum(p.numel() for p in recognizer.parameters())
    effort = f"{torch.get_num_threads()} threads, {minutes:.0f} minutes, {parameters / 1e6:.2f} M parameters, float16"
    paragraphs = (
        "# recognizer",
        "A convolutional network that says which of 8x8 cells hold an object's centre, of which shape and colour; "
        "differentiable, and easily fooled. It is the target of `reward=soft_oracle`, never a judge: the oracle is.",
        f"Made by `python run.py task=make_recognizer seed={cfg.seed}` (commit {git_commit()}, {effort}): "
        f"{task.steps} batches of {task.batch_size} rendered scenes, blurred, tinted and noised a little.",
        f"Held-back renders read as they are: {percent(right)}, n={right['n']}.",
    )
    write_atomic(folder / "README.md", "\n\n".join(paragraphs) + "\n")
    Console().print(f"recogniser: {folder}; held-back renders read as they are: {percent(right)}", soft_wrap=True)
    return {"recognizer": str(folder), "agreement": right}
