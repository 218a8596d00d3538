"""Time and peak memory of one evaluation with its gradient against D, for every regulariser. Writes cost.md.

    python experiments/gaussianity/cost.py                    # some minutes on a CPU; uses the GPU where there is one

Exponents are fitted, and ratios to PRNO are taken within a round. A fresh process for each
regulariser and size measures memory; times are taken in one process, all regularisers alternating,
so that a ratio compares like with like. Beside them runs one block of each kind of FLUX.1 at its
full size with random weights, in bfloat16 on a GPU and in float32 on a CPU: 19 double and 38 single
ones are an iteration's denoiser, forward and back.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
ARMS = ("reno", "kl", "kurtosis", "mpgr", "mpgr_natural", "gper", "prno")
SIZES = tuple(2**power for power in (12, 14, 16, 18, 20))
FLUX = {"double": 19, "single": 38}  # blocks of FLUX.1
TEXT, IMAGE, WIDTH, HEADS = 256, 1024, 3072, 24  # tokens of schnell's prompt and of 512 pixels


def evaluation(name: str, size: int, device: str):
    """A function that evaluates a regulariser and its gradient (or projects) once."""
    from checkerboard import regularizer

    made, generators = regularizer(name), [torch.Generator(device).manual_seed(0)]
    x = torch.randn(1, size, device=device, generator=torch.Generator(device).manual_seed(0))

    def once() -> None:
        if made.terms:
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(made(leaf, generators)[0].sum(), leaf)
        for _ in range(made.constraint is not None and 1 + made.constraint.project_gradient):
            made.constraint(x, x)
        if device == "cuda":
            torch.cuda.synchronize()

    return once


def flux_block(kind: str, device: str):
    """A function that goes through one of FLUX.1's blocks and back to its input once, one picture of 512 pixels."""
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    torch.manual_seed(0)
    made = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}[kind](WIDTH, HEADS, WIDTH // HEADS)
    given = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    block = made.to(**given).requires_grad_(False)
    image, text, temb = (torch.randn(1, *shape, **given) for shape in ((IMAGE, WIDTH), (TEXT, WIDTH), (WIDTH,)))
    angles = (TEXT + IMAGE, WIDTH // HEADS)
    rotary = torch.ones(angles, device=device), torch.zeros(angles, device=device)

    def once() -> None:
        leaf = image.clone().requires_grad_()
        _, out = block(leaf, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        torch.autograd.grad(out.float().sum(), leaf)
        if device == "cuda":
            torch.cuda.synchronize()

    return once


def beside_flux(device: str, rounds: int) -> list[str]:
    """Each regulariser at D = 65,536 against the blocks of FLUX.1, times of one round."""
    ready = {name: evaluation(name, 65536, device) for name in ARMS}
    blocks = {kind: flux_block(kind, device) for kind in FLUX}
    times = {name: [] for name in (*ready, *blocks)}
    for round_ in range(rounds + 1):
        for name, once in {**ready, **blocks}.items():
            start = time.perf_counter()
            once()
            if round_:
                times[name].append(time.perf_counter() - start)
    iteration = [sum(count * times[kind][i] for kind, count in FLUX.items()) for i in range(rounds)]
    block_times = ", ".join(f"{kind} {statistics.median(times[kind]):.2f} s" for kind in FLUX)
    precision = "bfloat16" if device == "cuda" else "float32"
    about = (
        f"19 double and 38 single blocks at full size, one of each timed ({block_times}), {precision}, 512 pixels, "
        f"forward and back to the input: {statistics.median(iteration):.0f} s an iteration, "
        "autoencoder and reward left out. What a regulariser adds to it, percent, "
        "median over rounds [least, greatest]:"
    )
    lines = ["", "## Beside FLUX.1", "", about, "", "| | percent of an iteration |", "|---|--:|"]
    return lines + share_rows(times, iteration)


def share_rows(times: dict[str, list[float]], iteration: list[float]) -> list[str]:
    """Of each regulariser, a row of a table: its seconds in percent of the iteration's.

    A cell is the median over rounds [least, greatest].
    """
    rows = []
    for name in ARMS:
        shares = [100 * own / whole for own, whole in zip(times[name], iteration, strict=True)]
        rows.append(f"| {name} | {statistics.median(shares):.4f} [{min(shares):.4f}, {max(shares):.4f}] |")
    return rows


def memory(name: str, size: int, device: str) -> float:
    """Bytes above what stood before, in this process."""
    once = evaluation(name, size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        return torch.cuda.max_memory_allocated() - before
    evaluation(name, 4096, device)()  # libraries load what they load
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    once()
    return resident("VmHWM") - before


def resident(line: str) -> int:
    """Bytes, of a line of this process's status (Linux)."""
    return 1024 * int(re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def seconds(size: int, device: str, rounds: int) -> dict[str, list[float]]:
    """Of each regulariser, a time a round; all take their turn in every round."""
    ready = {name: evaluation(name, size, device) for name in ARMS}
    times = {name: [] for name in ARMS}
    for round_ in range(rounds + 1):
        for name, once in ready.items():
            repeats = 1 if name == "prno" else 5
            start = time.perf_counter()
            for _ in range(repeats):
                once()
            if round_:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "D"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory_of:
        print(json.dumps(memory(options.memory_of[0], int(options.memory_of[1]), device)))
        return
    times = {size: seconds(size, device, options.rounds) for size in options.sizes}
    peak = {}
    for name in ARMS:
        for size in options.sizes:
            done = subprocess.run(
                [sys.executable, __file__, "--memory-of", name, str(size)], capture_output=True, text=True, check=True
            )
            peak[name, size] = json.loads(done.stdout.splitlines()[-1])
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    about = (
        f"`python experiments/gaussianity/cost.py --rounds {options.rounds}`, {where}: "
        "value and gradient of one latent of D values, and its constraint "
        "(gper: two projections, of gradient and noise). Milliseconds, median over rounds; the exponent is that of D "
        "in a least-squares fit of log time from 2^16 on [95 % bootstrap over rounds]; ratio: PRNO's time over it at "
        "D = 65,536, within a round [least, greatest]; memory above what stood before."
    )
    sizes = " | ".join(f"D = {size:,}" for size in options.sizes)
    lines = [
        "# What a regulariser costs",
        "",
        about,
        "",
        f"| | {sizes} | exponent | PRNO / it | MB at D = 65,536 | MB at the largest |",
        "|---|" + "--:|" * (len(options.sizes) + 4),
    ]
    for name in ARMS:
        milliseconds = [f"{1e3 * statistics.median(times[size][name]):.2f}" for size in options.sizes]
        megabytes = f"{peak[name, 65536] / 1e6:.1f} | {peak[name, options.sizes[-1]] / 1e6:.1f}"
        against_prno = ratio(times, name)
        fitted = exponent(times, name, options)
        lines.append(f"| {name} | {' | '.join(milliseconds)} | {fitted} | {against_prno} | {megabytes} |")
    lines += beside_flux(device, options.rounds)
    (HERE / "cost.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


def exponent(times: dict, name: str, options) -> str:
    sizes = [size for size in options.sizes if size >= 2**16]
    table, rng = np.log(np.array([times[size][name] for size in sizes])), np.random.default_rng(0)

    def fit(picks: np.ndarray) -> float:
        return np.polyfit(np.log(sizes), np.median(table[:, picks], axis=1), 1)[0]

    draws = [fit(rng.integers(0, table.shape[1], table.shape[1])) for _ in range(1000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{fit(np.arange(table.shape[1])):.2f} [{low:.2f}, {high:.2f}]"


def ratio(times: dict, name: str) -> str:
    if 65536 not in times:
        return "-"
    found = [a / b for a, b in zip(times[65536]["prno"], times[65536][name], strict=True)]
    return f"{statistics.median(found):.0f} [{min(found):.0f}, {max(found):.0f}]"


if __name__ == "__main__":
    main()
