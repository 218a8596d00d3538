"""Golden runs: what a change of structure must leave as it was, bit for bit.

    python -m tests.support.golden record <folder> [names]     run every command below, from this checkout
    python -m tests.support.golden compare <before> <after>    and say what differs

Two steps of every method on its tiny model, an evaluation, drawing, a search, a sweep, a kill's resume. Kept of each:
metrics, results, pictures, weights; left out: what a clock, a folder or a commit wrote.
"""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
PAIRS = ["debug=fdr", "benchmark.prompts_per_task=1", "method.optimizer.lr=1e-3"]
RUNS = {
    "iris": ["debug=fdr", "method.group_size=4"],
    "iris_released": ["debug=fdr", "method.group_size=4", "variant=released", "reward=t2i_r1_tiny"],
    "iris_oracle": ["debug=fdr", "method.group_size=4", "reward=oracle", "method.image_loss_weight=1"],
    "iris_lora": ["debug=fdr", "method=iris_lora", "method.group_size=4", "method.updates_per_rollout=2"],
    "irg": ["debug=fdr", "method=irg"],
    "irg_grpo": ["debug=fdr", "experiment=irg_grpo_shapes", "method.start_from=null", "method.group_size=2"],
    "agsm": [*PAIRS, "method=agsm", "model=sd3_tiny"],
    "agsm_sd": [*PAIRS, "method=agsm", "model=sd_tiny", "variant=released"],
    "softrepa": [*PAIRS, "method=softrepa", "model=sd_tiny"],
    "softrepa_sd3": [*PAIRS, "method=softrepa", "model=sd3_tiny", "variant=paper"],
    "denoising": [*PAIRS, "method=denoising", "model=sd_tiny"],
    "diffusion_dpo": [*PAIRS, "method=diffusion_dpo", "model=sd_tiny", "data.path={folder}/preferences"],
    "noise_opt": ["debug=fdr", "method=noise_opt"],
    "noise_langevin": ["debug=fdr", "method=noise_opt", "method/optimizer=langevin", "regularizer=gper"],
    "noise_sd": ["debug=fdr", "method=noise_opt", "model=sd_tiny", "method.eta=1"],
    "noise_search": ["debug=fdr", "method=noise_search"],
    "evaluate": ["task=evaluate", "benchmark.prompts_per_task=2"],
    "evaluate_sd3": ["task=evaluate", "model=sd3_tiny", "benchmark.prompts_per_task=2"],
    "evaluate_trained": [
        "task=evaluate",
        "ckpt_path={folder}/iris/checkpoints/last.ckpt",
        "benchmark.prompts_per_task=1",
    ],
    "generate": ["task=generate", "prompt=a red circle left of two blue squares"],
    "generate_turns": ["task=generate", "method=irg", "prompt=a red circle", "num_images=2"],
    "edit": ["task=edit", "model=sd3_tiny", "task.cases=2", "task.steps=10", "task.start=8"],
}
BEFORE = {
    "diffusion_dpo": [
        "task=make_preferences",
        "model=sd_tiny",
        "task.prompts_per_task=4",
        "task.out={folder}/preferences",
    ]
}
REPLACED = {"reward=t2i_r1_tiny": "reward=oracle"}
VOLATILE = re.compile(
    r"time|seconds|throughput|memory|commit|created|folder|command|version|path|file|elapsed|hostname|date|git|provenance|id$"
)


def record(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in RUNS.items():
        if names and name not in names:
            continue
        if name in BEFORE and not (folder / "preferences").exists():
            _run(folder, "preferences_run", BEFORE[name])
        _run(folder, name, [REPLACED.get(argument, argument) for argument in arguments])
    if not names or "resume" in names:
        _run(
            folder,
            "resume",
            ["debug=fdr", "method.group_size=4", "trainer.max_steps=1", "callbacks.checkpoint.every_n_steps=1"],
        )
        _run(
            folder,
            "resume",
            ["debug=fdr", "method.group_size=4", "trainer.max_steps=2", "callbacks.checkpoint.every_n_steps=1"]
            + ["ckpt_path={folder}/resume/checkpoints/last.ckpt"],
            "resume_second",
        )
    if not names or "sweep" in names:
        sweep = ["-m", "reward=nsc,random", "debug=fdr", "method.group_size=2", "benchmark.prompts_per_task=1"]
        _run(folder, "sweep", [*sweep, "hydra.sweep.dir={folder}/sweep"])


def _run(folder: Path, name: str, arguments: list[str], log: str | None = None) -> None:
    out = folder / (log or name)
    if (folder / f"{log or name}.done").exists():
        return
    arguments = [argument.replace("{folder}", str(folder)) for argument in arguments]
    if "-m" not in arguments:
        arguments = [*arguments, f"hydra.run.dir={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = [f"paths.root_dir={folder}"]
    with (folder / f"{log or name}.log").open("w") as lines:
        done = subprocess.run(
            [sys.executable, "run.py", *arguments, *root], cwd=ROOT, env=environment, stdout=lines, stderr=lines
        )
    print(name, "ok" if done.returncode == 0 else f"FAILED: {folder / name}.log", flush=True)
    if done.returncode == 0:
        (folder / f"{log or name}.done").touch()


def digest(folder: Path) -> dict[str, object]:
    """What is kept of the runs below a folder: a path and its content, or the content's hash."""
    kept: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".png":
            kept[name] = _hash(np.asarray(Image.open(path)).tobytes())
        elif path.name == "metrics.csv":
            with path.open() as rows:
                kept[name] = [_steady(row) for row in csv.DictReader(rows)]
        elif path.name in ("results.json", "summary.json", "cases.json") or path.suffix == ".jsonl":
            text = path.read_text()
            rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
            kept[name] = _steady(rows)
        elif path.suffix == ".safetensors":
            with safe_open(path, "np") as tensors:
                kept[name] = {key: _hash(tensors.get_tensor(key).tobytes()) for key in tensors.keys()}  # noqa: SIM118
        elif path.suffix == ".ckpt":
            kept[name] = _weights(path)
    return kept


def _weights(path: Path) -> dict[str, str]:
    import torch

    tensors: dict[str, str] = {}

    def walk(value, at):
        if isinstance(value, torch.Tensor):
            tensors[at] = _hash(
                value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            )
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{at}/{key}")

    state = torch.load(path, weights_only=True, map_location="cpu")
    walk({key: state[key] for key in ("state_dict", "optimizer_states") if key in state}, "")
    return tensors


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _steady(value):
    if isinstance(value, dict):
        return {key: _steady(part) for key, part in value.items() if not VOLATILE.search(key.lower())}
    if isinstance(value, list):
        return [_steady(part) for part in value]
    return re.sub(r"/\S*", "<path>", value) if isinstance(value, str) and value.startswith("/") else value


def compare(before: Path, after: Path) -> int:
    """Print what differs; the number of runs that do."""
    old, new = digest(before), digest(after)
    lines = [f"only before: {name}" for name in old.keys() - new.keys()]
    lines += [f"only after: {name}" for name in new.keys() - old.keys()]
    for name in sorted(old.keys() & new.keys()):
        lines += [f"{name}{line}" for line in _differences(old[name], new[name])][:12]
    print("\n".join(sorted(lines)) or f"equal: {len(old)} files")
    return len(lines)


def _differences(old, new, at="") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [f"{at}/{key}: only before" for key in old.keys() - new.keys()]
        lines += [f"{at}/{key}: only after" for key in new.keys() - old.keys()]
        return lines + [
            line for key in old.keys() & new.keys() for line in _differences(old[key], new[key], f"{at}/{key}")
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in _differences(*pair, f"{at}[{i}]")]
    if _class_name(old) and _class_name(old) == _class_name(new):
        return []  # a class may move to another module
    return [] if old == new or (old != old and new != new) else [f"{at}: {str(old)[:60]} != {str(new)[:60]}"]


def _class_name(value) -> str | None:
    return value.rpartition(".")[2] if isinstance(value, str) and re.fullmatch(r"t2i_rl(\.\w+)+", value) else None


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    if what == "record":
        record(Path(folder).resolve(), rest)
    else:
        sys.exit(compare(Path(folder), Path(rest[0])) > 0)
