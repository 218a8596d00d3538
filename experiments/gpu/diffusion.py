"""Item `diffusion`: a SoftREPA step a pair at SD3's shape; an iteration of noise optimisation at FLUX.1's, and what the
regulariser adds to it."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.bench_softrepa.steps import WAYS, timed
from experiments.gaussianity import cost
from experiments.gpu.models import FLUX_SHAPES, SD3_SHAPES, RandomFlux, RandomSD3, random_pairs, random_text
from experiments.gpu.record import Measured
from experiments.gpu.terms import Terms
from t2i_rl.core.prompts import Prompt
from t2i_rl.gaussianity.regularizer import Regularizer
from t2i_rl.methods.noise.climb import NoiseOptimization
from t2i_rl.methods.pairs.softrepa import SoftREPA


@dataclass(frozen=True)
class Cell:
    """A SoftREPA step of `batch` images under as many texts, `pairs` of them in a graph at a time."""

    size: int
    way: str
    batch: int
    pairs: int

    @property
    def name(self) -> str:
        return f"softrepa/{self.size}/{self.way}/{self.batch}/{self.pairs}"


@dataclass(frozen=True)
class Sizes:
    """The cells of SoftREPA, and of the noise its picture's side in pixels, the latent's numbers, and rounds."""

    cells: tuple[Cell, ...]
    pixels: int
    numbers: int
    rounds: int


GRAPHS = ("whole graph", "checkpointed")  # in this order: checkpointing stays on once it is on
SIZES = {
    "real": Sizes(
        (
            Cell(1024, "ours", 4, 4),
            Cell(1024, "plain", 2, 4),
            Cell(1024, "plain", 4, 16),
            Cell(1024, "ours", 4, 2),
            Cell(1024, "ours", 8, 4),
            Cell(512, "ours", 4, 16),
            Cell(512, "plain", 4, 16),
            Cell(512, "ours", 8, 8),
            Cell(512, "plain", 8, 64),
        ),
        512,
        65536,
        7,
    ),
    "tiny": Sizes((Cell(32, "ours", 3, 3), Cell(32, "ours", 3, 2), Cell(32, "plain", 3, 9)), 32, 4096, 3),
}


def run(measured: Measured, terms: Terms) -> None:
    sizes, device = SIZES[terms.sizes], torch.device(terms.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    _softrepa(measured, [cell for cell in sizes.cells if cell.name not in measured.values], terms.sizes, device, dtype)
    open_graphs = [name for name in GRAPHS if f"noise/{name}" not in measured.values]
    if open_graphs:
        flux = RandomFlux(FLUX_SHAPES[terms.sizes], sizes.pixels, device, dtype)
        for name in open_graphs:
            search = partial(_iterations, flux, name == "checkpointed", sizes.rounds)
            measured.keep(f"noise/{name}", _unless_out_of_memory(search, device))
        del flux
        _free(device)
    if "regularisers" not in measured.values:
        measured.keep("regularisers", cost.seconds(sizes.numbers, terms.device, sizes.rounds))


def _softrepa(measured: Measured, cells: list[Cell], sizes: str, device: torch.device, dtype: torch.dtype) -> None:
    if not cells:
        return
    model = RandomSD3(SD3_SHAPES[sizes], cells[0].size, device, dtype)
    method = SoftREPA(model, partial(torch.optim.AdamW, lr=1e-3)).to(device)
    optimizer = torch.optim.AdamW(method.bank.parameters(), lr=1e-3)
    for cell in cells:
        model.size, method.pairs_per_pass = cell.size, cell.pairs
        step = WAYS[cell.way](method, random_pairs(model, cell.batch), optimizer)
        measure = partial(timed, step, device, 3, bf16=device.type == "cuda")
        measured.keep(cell.name, _unless_out_of_memory(measure, device))
    del model, method, optimizer, step, measure
    _free(device)


def _free(device: torch.device) -> None:
    """Give back what nobody holds any more; hooks and the modules that they are in hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _unless_out_of_memory(measure: Callable[[], dict], device: torch.device) -> dict:
    """What a measurement gives, or that its graph does not fit, which is a finding too."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        pass  # and out of here, so that no traceback holds the graph
    _free(device)
    return {"out_of_memory": True, "held_bytes": torch.cuda.memory_allocated(device)}


class Brightness:
    """A reward that costs nothing: the mean of the pixels. It writes down when it was asked, once an iteration."""

    differentiable = True

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return pixels.mean(dim=(1, 2, 3))


def _iterations(flux: RandomFlux, checkpointed: bool, rounds: int) -> dict:
    """Seconds of `rounds` iterations of one noise after a first one, without a regulariser, and bytes at the peak."""
    reward = Brightness(flux.device)
    method = NoiseOptimization(
        flux,
        reward,
        {},
        Regularizer(),
        partial(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True),
        iterations=rounds + 2,
        measure_every=10**6,
        image_every=10**6,
        gradient_checkpointing=checkpointed,
        folder=Path("nowhere"),
    ).to(flux.device)
    prompt = Prompt("0", "a picture")
    method.prompts, method.texts = [prompt], {prompt.text: random_text(flux, 1)}
    if flux.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    method.search(method.cases())
    ends = reward.times[1:]  # the first iteration waits for memory and measures the noise's health
    seconds = [end - start for start, end in zip(ends, ends[1:], strict=False)][:rounds]
    peak = torch.cuda.max_memory_allocated() if flux.device.type == "cuda" else None
    return {"seconds": seconds, "peak_bytes": peak}


def table(measured: Measured) -> str:
    values = measured.values
    lines = [
        "SoftREPA at SD3 medium's shape, kept encodings in both ways (`plain`: all pairs in one graph, as released; "
        "`ours`: so many at a time), bytes above the weights. Median of 3 steps.",
        "",
        "| pixels | way | B | pairs in a graph | ms a pair | GB |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for name, value in values.items():
        if name.startswith("softrepa/"):
            _, size, way, batch, pairs = name.split("/")
            figures = "out of memory |"
            if "seconds" in value:
                figures = f"{1e3 * value['seconds'] / int(batch) ** 2:.1f} | {value['bytes'] / 1e9:.1f}"
            lines.append(f"| {size} | {way} | {batch} | {min(int(pairs), int(batch) ** 2)} | {figures} |")
    lines += [
        "",
        "Noise optimisation at FLUX.1-schnell's shape: one noise, one step of the sampler, the autoencoder's decoder, "
        "and back; the reward is the mean pixel. GB: the peak, weights among it.",
        "",
        "| graph | ms an iteration | [least, greatest] | GB |",
        "|---|--:|--:|--:|",
    ]
    for name in GRAPHS:
        value = values.get(f"noise/{name}", {})
        if "seconds" in value:
            ms = [1e3 * seconds for seconds in value["seconds"]]
            peak = f"{value['peak_bytes'] / 1e9:.1f}" if value["peak_bytes"] else ""
            lines.append(f"| {name} | {statistics.median(ms):.1f} | [{min(ms):.1f}, {max(ms):.1f}] | {peak} |")
        elif value:
            lines.append(f"| {name} | out of memory | | |")
    measured_graphs = [values[f"noise/{name}"] for name in GRAPHS if f"noise/{name}" in values]
    iterations = [value["seconds"] for value in measured_graphs if "seconds" in value]
    if iterations and "regularisers" in values:
        lines += [
            "",
            "What a regulariser (value, gradient, constraint) adds to an iteration of the first row that there is:",
            "",
            "| | percent of an iteration |",
            "|---|--:|",
            *cost.share_rows(values["regularisers"], iterations[0]),
        ]
    return "\n".join(lines)
