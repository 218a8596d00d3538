"""A training step of SoftREPA or AGSM, as the released code does it and as ours does, and what it takes."""

import resource
import statistics
import time
from collections.abc import Callable

import torch

from t2i_rl.data.encodings import EncodedPairs
from t2i_rl.methods.pairs.loss import agsm_targets, alignment_guidance, pair_errors, softrepa_loss
from t2i_rl.models.diffusion.base import attention_for_training


@torch.no_grad()
def encoded(model, batch) -> EncodedPairs:
    """A batch of pairs as a folder of encodings keeps it."""
    mean, std = model.posterior(batch.pixels)
    return EncodedPairs(batch.numbers, batch.captions, mean, std, model.compact(model.encode_prompts(batch.captions)))


def ours(method, batch, optimizer) -> Callable[[], None]:
    """One step: tokens looked up once an image, at most `method.pairs_per_pass` rows in a graph."""

    def step() -> None:
        grid = method.grid(batch)
        emitted = method.emit(method.bank, grid.t)
        tokens = emitted.detach().requires_grad_()
        with attention_for_training(method.model):
            method.accumulate(grid, tokens)
        (emitted * tokens.grad).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step()

    return step


def plain(method, batch, optimizer) -> Callable[[], None]:
    """One step as released: everything tiled to all pairs, tokens looked up for each, one graph."""
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


WAYS = {"plain": plain, "ours": ours}


def timed(step: Callable[[], None], device: torch.device, steps: int, bf16: bool) -> dict[str, float]:
    """Median seconds of so many steps after a first one, and bytes at the peak above what stood before that.

    On a CPU the peak is that of the whole process so far: a figure of one step needs a process of its own.
    """
    before = _held(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        step()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "bytes": _peak(device) - before}


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
