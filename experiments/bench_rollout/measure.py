"""Stopwatch, memory meter, and what the machine itself can do: copy bandwidth and matrix products."""

import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from t2i_rl.core.precision import cpu_has_bfloat16


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(calls: dict[Any, Callable], device: torch.device, repeats: int) -> Iterator[tuple[Any, float]]:
    """Name and seconds of each call in each of `repeats` rounds; a round makes all of them, so that what slows the
    machine slows them alike."""
    for _ in range(repeats):
        for name, function in calls.items():
            yield name, seconds(function, device)


def ratios(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the round-by-round ratio."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(each), min(each), max(each)


def peak_gib(function: Callable, device: torch.device) -> float:
    """What a call allocates at its peak above what was held before it: torch's own count on a GPU, resident pages on a
    CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return (peak - before) / 2**30


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, while copying a tensor that no cache holds; best of ten."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large square product of normal numbers (on zeros and ones it runs
    faster); best of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def machine(device: torch.device) -> str:
    """The GPU's name; of a CPU also its threads and whether it has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = "with" if cpu_has_bfloat16() else "without"
    return f"{torch.get_num_threads()} threads of {cpu_name()}, {instructions} bfloat16 instructions"


def cpu_name() -> str:
    """As Linux names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
