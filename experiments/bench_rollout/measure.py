"""Stopwatch, memory meter, and what the machine itself can do: copy bandwidth and matrix products."""

import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(variants: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant in each of `repeats` rounds; a round runs all of them, so that what slows the machine slows them alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            times[name].append(seconds(function, device))
    return times


def ratios(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the round-by-round ratio."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(each), min(each), max(each)


def peak_gib(function: Callable, device: torch.device) -> float:
    """What a call allocates at its peak above what was held before it: torch's own count on a GPU, resident pages on a CPU."""
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
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large square product; best of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))
