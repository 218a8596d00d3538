"""What run.py measures: every way to roll out, call by call, so that what is cut short keeps the calls it has made."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from experiments.bench_rollout import measure, plain
from experiments.bench_rollout.sizes import SIZES, SPECIAL, build
from t2i_rl.models.autoregressive.engine.decode import decode_image, decode_text
from t2i_rl.models.autoregressive.engine.engine import Engine, EngineOptions

GUIDANCE = 5.0
# Images at a time in T2I-R1's script: a rank holds one prompt, whose group is 8 (its split of 32 rows never binds).
CHUNK = 8
PLAIN = f"plain loop, {CHUNK} at a time"
PLAIN_AT_ONCE = "plain loop, all at once"
GRAPH, COMPILED = "+ CUDA graph", "+ compiled halves of a layer"


@dataclass
class Settings:
    """What is measured.

    Args:
        prefix: tokens of the longest conversation.
        repeats: rounds; each makes every call once.
        compile: torch.compile too, which takes minutes.
        chunks: how many chunks of the loops that go chunk by chunk are timed; None: all. The chunks are alike.
        only: names of the ways to measure, None: all.
    """

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    prompts: int = 8
    group: int = 8
    prefix: int = 40
    plan_tokens: int = 64
    repeats: int = 5
    compile: bool = False
    chunks: int | None = None
    only: tuple[str, ...] | None = None


@dataclass
class Way:
    """One way to make `images` images, or as many plans."""

    call: Callable
    images: int
    engine: Engine | None = None


def conversations(size: str, prompts: int, group: int, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prefixes `(prompts * group, length)`, left-padded to different lengths, each ending in begin-of-image."""
    generator = torch.Generator().manual_seed(0)
    count = prompts * group
    ids = torch.randint(5, SIZES[size][4], (count, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (count,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) >= length - lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, SPECIAL["pad"])
    ids[torch.arange(count), length - lengths] = SPECIAL["bos"]
    ids[:, -1] = SPECIAL["boi"]
    return ids.to(device), mask.to(device)


def image_ways(model, ids, mask, settings: Settings) -> dict[str, Way]:
    """The image phase in the model's own dtype, slowest tricks first."""
    count, rows = model.config.vision_config.num_image_tokens, len(ids)
    few = min(rows, CHUNK * (settings.chunks or rows))
    options = EngineOptions(max_rows=CHUNK, graphs=False)
    tricks = {f"static cache, packed weights, {CHUNK} at a time": options}
    tricks["+ all rows that fit"] = options = replace(options, max_rows=None)
    if ids.device.type == "cuda":
        tricks[GRAPH] = options = replace(options, graphs=True)
    if settings.compile:
        tricks[COMPILED] = replace(options, compile=True)

    def drawn(engine: Engine, images: int) -> torch.Tensor:
        engine.load(model)
        sampling = {"count": count, "special": SPECIAL, "guidance_scale": GUIDANCE}
        return decode_image(engine, ids[:images], mask[:images], list(range(images)), **sampling).tokens

    def loop(images: int, chunk: int) -> Way:
        prefixes = ids[:images], mask[:images]
        return Way(lambda: plain.plain_images(model, *prefixes, SPECIAL, GUIDANCE, chunk), images)

    ways = {
        "transformers generate": Way(lambda: plain.transformers_images(model, ids, mask, GUIDANCE), rows),
        PLAIN: loop(few, CHUNK),
        PLAIN_AT_ONCE: loop(rows, rows),
    }
    for name, options in tricks.items():
        engine, images = Engine(options), few if options.max_rows else rows
        ways[name] = Way(lambda engine=engine, images=images: drawn(engine, images), images, engine)
    return ways


def plan_ways(model, size: str, settings: Settings, device) -> dict[str, Way]:
    """Phase 1: the plain loop, each row reading its own prompt, and the prompt shared by its group."""
    ids, mask = conversations(size, settings.prompts, 1, settings.prefix, device)
    every, every_mask = ids.repeat_interleave(settings.group, 0), mask.repeat_interleave(settings.group, 0)
    rows, engine = len(every), Engine(EngineOptions())
    few = min(rows, CHUNK * (settings.chunks or rows))

    def loop(plans: int, chunk: int) -> Way:
        prefixes = every[:plans], every_mask[:plans]
        return Way(lambda: plain.plain_text(model, *prefixes, settings.plan_tokens, chunk), plans)

    def written(prompts: torch.Tensor, prompt_mask: torch.Tensor) -> Way:
        options = {"max_tokens": settings.plan_tokens, "eos": -1}
        return Way(lambda: decode_text(engine.load(model), prompts, prompt_mask, list(range(rows)), **options), rows)

    return {
        PLAIN: loop(few, CHUNK),
        PLAIN_AT_ONCE: loop(rows, rows),
        "engine, own prompts": written(every, every_mask),
        "engine, prompt shared by its group": written(ids, mask),
    }


def floors(way: Way, prefix: int, count: int, device) -> dict[str, float]:
    """Seconds below which a way's image phase cannot go: bytes that its steps must read (weights, and keys and values
    of every row) over copy bandwidth, and their products over the rate of a large product. `floor` has, for each step,
    the greater of the two. A row is doubled for guidance."""
    engine = way.engine
    chunks = math.ceil(way.images / (engine.options.max_rows or way.images))
    rows = 2 * way.images / chunks
    bandwidth, rate = measure.copy_bandwidth(device), measure.matmul_rate(engine.dtype, device)
    weights = engine.weights.bytes_per_step()
    flops = 2 * rows * weights / engine.dtype.itemsize
    memory = [(weights + rows * engine.cache_bytes(prefix + step)) / bandwidth for step in range(count)]
    return {
        "bandwidth": bandwidth,
        "matmul_rate": rate,
        "memory": chunks * sum(memory),
        "compute": chunks * count * flops / rate,
        "floor": chunks * sum(max(step, flops / rate) for step in memory),
    }


def bench(
    size: str,
    settings: Settings,
    device,
    result: dict | None = None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Every way of both phases, each dtype's side by side in every round.

    Args:
        result: what an earlier call had measured when it was cut short; its whole rounds count.
        keep: is given all that is measured so far, after every call.
    """
    ids, mask = conversations(size, settings.prompts, settings.group, settings.prefix, device)
    count = SIZES[size][-1]
    result = result or {"size": size, "images": len(ids), "image_tokens": count, "rows": [], "plans": []}
    calls = {}
    for dtype in settings.dtypes:
        model = build(size, getattr(torch, dtype), device)
        phases = {"rows": image_ways(model, ids, mask, settings), "plans": plan_ways(model, size, settings, device)}
        for phase, ways in phases.items():
            for name, way in ways.items():
                if settings.only and name not in settings.only:
                    continue
                row = row_of(result[phase], name, dtype)
                row |= {"images": way.images, "peak_gib": measure.peak_gib(way.call, device)}  # warms up as well
                if way.engine is not None:
                    row["floors"] = floors(way, ids.shape[1], count, device)
                calls[phase, dtype, name] = way.call
                keep(result)
    rows = [*result["rows"], *result["plans"]]
    rounds = min(len(row["seconds"]) for row in rows)
    for row in rows:
        del row["seconds"][rounds:]
    for (phase, dtype, name), seconds in measure.interleaved(calls, device, settings.repeats - rounds):
        row_of(result[phase], name, dtype)["seconds"].append(seconds)
        keep(result)
    return result


def row_of(rows: list[dict], name: str, dtype: str) -> dict:
    """The row of a way in a dtype; a new one, if there is none."""
    row = next((row for row in rows if (row["name"], row["dtype"]) == (name, dtype)), None)
    if row is None:
        row = {"name": name, "dtype": dtype, "seconds": []}
        rows.append(row)
    return row
