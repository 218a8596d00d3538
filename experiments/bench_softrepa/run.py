"""Time a training step and its peak memory against B, the B x B expansion as the released code does it beside ours; and what tokens cost while drawing.

    python experiments/bench_softrepa/run.py                         on whatever device there is; a fresh process for every cell
    python experiments/bench_softrepa/run.py --sizes 4 16 --methods softrepa --repeats 5

The plain way encodes captions and images every step, tiles everything to B * B rows, runs them in one graph with the tokens looked up for each row, and lets
torch choose its attention kernel. Ours reads kept encodings, looks the tokens up once an image, and runs at most `--pairs` rows at a time. Same model, same pairs,
same dtype, alternating; a ratio is the median over rounds of plain / ours within a round. Writes results/*.json and table.md beside this file.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
METHODS = ("softrepa", "agsm")
MODELS = ("sd_tiny", "sd3_tiny")


def load(model: str, device: torch.device, dtype: str = "float32"):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from t2i_rl.command import cli

    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return (
            instantiate(compose("config", [f"model={model}", f"model.dtype={dtype}"]).model)
            .requires_grad_(False)
            .to(device)
        )


def batch_of(count: int):
    from t2i_rl.data.pairs import ShapesStream
    from t2i_rl.shapes.examples import TASK_WEIGHTS

    return next(iter(ShapesStream(count, TASK_WEIGHTS, 0, 0)))


def ours(method, batch, optimizer):
    """One step on kept encodings."""
    from t2i_rl.data.encodings import EncodedPairs
    from t2i_rl.models.diffusion.base import attention_for_training

    with torch.no_grad():
        mean, std = method.model.posterior(batch.pixels)
        kept = EncodedPairs(
            batch.numbers, batch.captions, mean, std, method.model.compact(method.model.encode_prompts(batch.captions))
        )

    def step() -> None:
        grid = method.grid(kept)
        emitted = method.emit(method.bank, grid.t)
        tokens = emitted.detach().requires_grad_()
        with attention_for_training(method.model):
            method.accumulate(grid, tokens)
        (emitted * tokens.grad).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step()

    return step


def plain(method, batch, optimizer):
    """One step as released: everything encoded anew and tiled, one graph."""
    from t2i_rl.methods.pairs.loss import agsm_targets, alignment_guidance, pair_errors, softrepa_loss

    model, count = method.model, len(batch.captions)
    images = torch.arange(count, device=method.device).repeat(count)  # text-major, as released
    texts = torch.arange(count, device=method.device).repeat_interleave(count)
    branch = (images != texts).long() if method.branches == 2 else torch.zeros_like(images)
    own = torch.arange(count, device=method.device)

    def square(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (count, count)).transpose(0, 1)

    def step() -> None:
        grid = method.grid(batch)
        tile = (grid.x_t[images], grid.t[images], grid.text[texts])
        said = square(model.predict(*tile, method.bank(grid.t[images], branch)))
        if method.branches == 1:
            loss = softrepa_loss(pair_errors(said, grid.target.unsqueeze(1)), own).mean()
        else:
            reference = square(model.predict(*tile, method.average(grid.t[images], branch)))
            _, delta = alignment_guidance(reference, grid.target)
            errors = pair_errors(said, agsm_targets(grid.target, delta, own, 1.0, 0.1))
            eye = torch.eye(count, dtype=torch.bool, device=method.device)
            loss = errors[eye].mean() + errors[~eye].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step()

    return step


def cell(arguments) -> dict:
    """One process: seconds a step, and bytes above what stood before the first step."""
    from t2i_rl.methods.pairs.agsm import AGSM
    from t2i_rl.methods.pairs.softrepa import SoftREPA

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(arguments.model, device)
    kind = {"softrepa": SoftREPA, "agsm": AGSM}[arguments.methods[0]]
    method = kind(model, partial(torch.optim.AdamW, lr=1e-3), pairs_per_pass=arguments.pairs).to(device)
    method.bank.to(device)
    optimizer = torch.optim.AdamW(method.bank.parameters(), lr=1e-3)
    step = {"plain": plain, "ours": ours}[arguments.way](method, batch_of(arguments.sizes[0]).to(device), optimizer)
    before = peak(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        step()
        seconds = []
        for _ in range(arguments.steps):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": peak(device) - before}


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def drawing(model_name: str, repeats: int, dtype: str) -> dict:
    """Seconds to draw 16 pictures without tokens, and with them, alternating in pairs that change sides."""
    from t2i_rl.models.diffusion.soft_tokens import SoftTokens, spec_for

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(model_name, device, dtype)
    handle = model.attach(SoftTokens(spec_for(model.denoiser, None, 4)).to(device))
    times = {True: [], False: []}
    for turn in range(repeats + 1):
        for on in (False, True) if turn % 2 else (True, False):
            handle.enable(on)
            start = time.perf_counter()
            model.sample(["three red circles"] * 16, list(range(16)))
            times[on].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times[True][1:], times[False][1:], strict=True)]
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"plain": statistics.median(times[False][1:]), "ratio": statistics.median(ratios), "low": low, "high": high, "n": repeats}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 8, 16, 24])
    parser.add_argument("--pairs", type=int, default=64, help="rows with a live graph at a time, in ours")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drawings", type=int, default=20, help="pairs of drawings without and with tokens")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--way", choices=("plain", "ours"), help="one cell, in this process")
    parser.add_argument("--model", help="with --way")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(cell(arguments)))
        return
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} threads of {platform.machine()}"
    )
    (HERE / "results").mkdir(exist_ok=True)
    for model in arguments.models:
        rows = [row for method in arguments.methods for row in grow(model, method, arguments)]
        result = {"command": " ".join(["python experiments/bench_softrepa/run.py", *sys.argv[1:]]), "model": model, "device": device, "bf16": arguments.bf16, "pairs": arguments.pairs, "steps": arguments.steps,
                  "repeats": arguments.repeats, "rows": rows, "drawing": drawing(model, arguments.drawings, "bfloat16" if arguments.bf16 else "float32")}  # fmt: skip
        name = f"{model}_{'bf16' if arguments.bf16 else 'fp32'}_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
        (HERE / "results" / name).write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "table.md").write_text(
        table([json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))])
    )
    print((HERE / "table.md").read_text())


def grow(model: str, method: str, arguments) -> list[dict]:
    """Rows of one method on one model, B by B."""
    rows = []
    for size in arguments.sizes:
        rounds = {"plain": [], "ours": []}
        for _ in range(arguments.repeats):
            for way, found in rounds.items():
                command = [sys.executable, __file__, "--way", way, "--model", model, "--methods", method, "--sizes", str(size),
                           "--pairs", str(arguments.pairs), "--steps", str(arguments.steps)] + ["--bf16"] * arguments.bf16  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parents[1])
                found.append(json.loads(done.stdout.splitlines()[-1]))
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(rounds["plain"], rounds["ours"], strict=True)]
        row = {"method": method, "B": size, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        for way, found in rounds.items():
            row[way] = {key: statistics.median(each[key] for each in found) for key in ("seconds", "bytes")}
        rows.append(row)
        print(model, row, flush=True)
    return rows


def table(results: list[dict]) -> str:
    lines = [
        "# A training step against B",
        "",
        "What is compared is said in run.py. Ratios: median [least, greatest] over rounds of plain / ours within a round.",
        "",
    ]
    for result in results:
        lines += [
            f"## {result['model']}, {'bfloat16 autocast' if result['bf16'] else 'float32'}, {result['device']}, {result['pairs']} pairs a pass", "",
            f"`{result['command']}`, {result['repeats']} rounds.", "",
            "| method | B | plain, ms a pair | ours, ms a pair | plain / ours | plain, MB | ours, MB |", "|---|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        for row in result["rows"]:
            per_pair = [1e3 * row[way]["seconds"] / row["B"] ** 2 for way in ("plain", "ours")]
            memory = [row[way]["bytes"] / 1e6 for way in ("plain", "ours")]
            lines.append(
                f"| {row['method']} | {row['B']} | {per_pair[0]:.2f} | {per_pair[1]:.2f} | {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] "
                f"| {memory[0]:.0f} | {memory[1]:.0f} |"
            )
        drawn = result["drawing"]
        lines += [
            "",
            f"Drawing 16 pictures: {drawn['plain']:.2f} s; with tokens {drawn['ratio']:.3f} [{drawn['low']:.3f}, {drawn['high']:.3f}] times that (median of {drawn['n']} pairs, bootstrap).",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
