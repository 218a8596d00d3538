"""Eight prompts in one graph against eight graphs of one, on flux_tiny. Writes batch.md.

    python experiments/gaussianity/batch.py                   # ten minutes on two CPU cores

A ratio is of two times in one round, and rounds alternate. It also measures what part of an
iteration the regulariser takes.
"""

import argparse
import statistics
import time
from itertools import product
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from t2i_rl.command import cli
from t2i_rl.core.files import write_atomic
from t2i_rl.shapes.suites import select_prompts

HERE = Path(__file__).parent


def made(overrides: list[str], iterations: int):
    """The method as `run.py method=noise_opt` makes it, with nothing measured on the way, and eight cases."""
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose(
            "config",
            [
                "method=noise_opt",
                f"method.iterations={iterations}",
                "method.measure_every=100000",
                "method.image_every=100000",
                *overrides,
            ],
        )
    method = instantiate(
        cfg.method, model=instantiate(cfg.model), reward=instantiate(cfg.reward), watch={}, folder=HERE / "nowhere"
    )
    method.prompts = select_prompts("test", 2)[:8]
    with torch.no_grad():
        method.texts = {prompt.text: method.model.encode_prompts([prompt.text]) for prompt in method.prompts}
    return method


def seconds(method, batches: list[list]) -> float:
    start = time.perf_counter()
    for batch in batches:
        method.search(batch)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    options = parser.parse_args()
    command = (
        f"python experiments/gaussianity/batch.py --rounds {options.rounds} --iterations {options.iterations} "
        f"--threads {' '.join(map(str, options.threads))}"
    )
    columns = [
        "threads",
        "regulariser",
        "eight alone, ms an iteration and case",
        "together",
        "ratio",
        "regulariser's part of an iteration together",
    ]
    lines = [
        "# Eight prompts in one graph",
        "",
        f"`{command}` on CPU threads, flux_tiny, soft oracle: median over rounds [least, greatest].",
        "",
        f"| {' | '.join(columns)} |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for threads, name in product(options.threads, ("none", "mpgr", "mpgr_natural", "prno")):
        torch.set_num_threads(threads)
        method = made([f"regularizer={name}"], options.iterations)
        cases = method.cases()
        alone, together = [], []
        for round_ in range(options.rounds + 1):
            times = seconds(method, [[case] for case in cases]), seconds(method, [cases])
            if round_:
                alone.append(times[0])
                together.append(times[1])
        ratios = [a / b for a, b in zip(alone, together, strict=True)]
        scale = 1e3 / (8 * (options.iterations + 1))
        alone_ms, together_ms = scale * statistics.median(alone), scale * statistics.median(together)
        ratio = f"{statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]"
        percent = 100 * share(method, statistics.median(together) / (options.iterations + 1))
        lines.append(f"| {threads} | {name} | {alone_ms:.1f} | {together_ms:.1f} | {ratio} | {percent:.1f} % |")
        print(lines[-1], flush=True)
    write_atomic(HERE / "batch.md", "\n".join([*lines, ""]))


def share(method, iteration: float) -> float:
    """Of a batched iteration's seconds, what penalty and gradient alone take."""
    if not method.regularizer.terms:
        return 0.0
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    noise = torch.randn(8, *method.noise_shape())
    times = []
    for _ in range(20):
        start = time.perf_counter()
        leaf = noise.clone().requires_grad_()
        torch.autograd.grad(method.regularizer(leaf, generators)[0].sum(), leaf)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / iteration


if __name__ == "__main__":
    main()
