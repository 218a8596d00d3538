"""Time a training step and its peak memory against B, the B x B expansion as the released code does it beside ours; and
what tokens cost while drawing.

    python experiments/bench_softrepa/run.py                         on whatever device there is
    python experiments/bench_softrepa/run.py --sizes 4 16 --methods softrepa --repeats 5

The plain way encodes captions and images every step, tiles everything to B * B rows, runs them in one graph with the
tokens looked up for each row, and lets torch choose its attention kernel. Ours reads kept encodings, looks the tokens
up once an image, and runs at most `--pairs` rows at a time. Same model, same pairs, same dtype, alternating, a fresh
process for every cell; a ratio is the median over rounds of plain / ours within a round. Writes results/*.json and
table.md beside this file.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.bench_softrepa.steps import WAYS, encoded, timed
from t2i_rl.command import cli
from t2i_rl.core.files import write_atomic
from t2i_rl.data.pairs import ShapesStream
from t2i_rl.methods.pairs.agsm import AGSM
from t2i_rl.methods.pairs.softrepa import SoftREPA
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, spec_for
from t2i_rl.shapes.examples import TASK_WEIGHTS

HERE = Path(__file__).parent
METHODS = {"softrepa": SoftREPA, "agsm": AGSM}
MODELS = ("sd_tiny", "sd3_tiny")


def load(model: str, device: torch.device, dtype: str = "float32"):
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        settings = compose("config", [f"model={model}", f"model.dtype={dtype}"]).model
    return instantiate(settings).requires_grad_(False).to(device)


def cell(arguments) -> dict:
    """One process: seconds a step, and bytes above what stood before the first step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(arguments.model, device)
    kind = METHODS[arguments.methods[0]]
    method = kind(model, partial(torch.optim.AdamW, lr=1e-3), pairs_per_pass=arguments.pairs).to(device)
    method.bank.to(device)
    optimizer = torch.optim.AdamW(method.bank.parameters(), lr=1e-3)
    batch = next(iter(ShapesStream(arguments.sizes[0], TASK_WEIGHTS, 0, 0))).to(device)
    if arguments.way == "ours":
        batch = encoded(model, batch)
    return timed(WAYS[arguments.way](method, batch, optimizer), device, arguments.steps, arguments.bf16)


def drawing(model_name: str, repeats: int, dtype: str) -> dict:
    """Seconds to draw 16 pictures without tokens, and with them, alternating in pairs that change sides."""
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
    middle = {"plain": statistics.median(times[False][1:]), "ratio": statistics.median(ratios)}
    return middle | {"low": low, "high": high, "n": repeats}


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
    parser.add_argument("--way", choices=list(WAYS), help="one cell, in this process")
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
    command = " ".join(["python experiments/bench_softrepa/run.py", *sys.argv[1:]])
    given = {name: getattr(arguments, name) for name in ("bf16", "pairs", "steps", "repeats")}
    for model in arguments.models:
        rows = [row for method in arguments.methods for row in grow(model, method, arguments)]
        drawn = drawing(model, arguments.drawings, "bfloat16" if arguments.bf16 else "float32")
        result = {"command": command, "model": model, "device": device, **given, "rows": rows, "drawing": drawn}
        name = f"{model}_{'bf16' if arguments.bf16 else 'fp32'}_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
        write_atomic(HERE / "results" / name, json.dumps(result, indent=1) + "\n")
    text = table([json.loads(file.read_text()) for file in sorted((HERE / "results").glob("*.json"))])
    write_atomic(HERE / "table.md", text)
    print(text)


def grow(model: str, method: str, arguments) -> list[dict]:
    """Rows of one method on one model, B by B."""
    rows = []
    for size in arguments.sizes:
        rounds = {"plain": [], "ours": []}
        given = ["--model", model, "--methods", method, "--sizes", str(size), "--pairs", str(arguments.pairs)]
        given += ["--steps", str(arguments.steps), *["--bf16"] * arguments.bf16]
        for _ in range(arguments.repeats):
            for way, cells in rounds.items():
                command = [sys.executable, __file__, "--way", way, *given]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parents[1])
                cells.append(json.loads(done.stdout.splitlines()[-1]))
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(rounds["plain"], rounds["ours"], strict=True)]
        row = {"method": method, "B": size, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        for way, cells in rounds.items():
            row[way] = {key: statistics.median(cell[key] for cell in cells) for key in ("seconds", "bytes")}
        rows.append(row)
        print(model, row, flush=True)
    return rows


def table(results: list[dict]) -> str:
    lines = [
        "# A training step against B",
        "",
        "What is compared is said in run.py. Ratios: median [least, greatest] over rounds of plain / ours within a "
        "round.",
        "",
    ]
    for result in results:
        dtype = "bfloat16 autocast" if result["bf16"] else "float32"
        lines += [
            f"## {result['model']}, {dtype}, {result['device']}, {result['pairs']} pairs a pass",
            "",
            f"`{result['command']}`, {result['repeats']} rounds.",
            "",
            "| method | B | plain, ms a pair | ours, ms a pair | plain / ours | plain, MB | ours, MB |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result["rows"]:
            per_pair = [1e3 * row[way]["seconds"] / row["B"] ** 2 for way in ("plain", "ours")]
            memory = [row[way]["bytes"] / 1e6 for way in ("plain", "ours")]
            ratio = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            numbers = f"{per_pair[0]:.2f} | {per_pair[1]:.2f} | {ratio} | {memory[0]:.0f} | {memory[1]:.0f}"
            lines.append(f"| {row['method']} | {row['B']} | {numbers} |")
        drawn = result["drawing"]
        lines += [
            "",
            f"Drawing 16 pictures: {drawn['plain']:.2f} s; with tokens {drawn['ratio']:.3f} [{drawn['low']:.3f}, "
            f"{drawn['high']:.3f}] times that (median of {drawn['n']} pairs, bootstrap).",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
