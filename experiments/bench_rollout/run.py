"""How fast a rollout is, trick by trick, beside transformers' own generation and the plain loop; one process, same weights, same prompts, and every
ratio between two of one dtype.

    python experiments/bench_rollout/run.py --size tiny --step --compile
    python experiments/bench_rollout/run.py --size mid --prompts 2 --repeats 3
    python experiments/bench_rollout/run.py --size 1b --dtypes bfloat16 --step --compile      (GPU: the exact shapes of Janus-Pro-1B)

Each writes its JSON file into results/ beside this file, and table.md anew from all of them.
"""

import argparse
import json
import platform
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from experiments.bench_rollout import measure, plain
from experiments.bench_rollout.grpo_step import grpo_step
from experiments.bench_rollout.sizes import SIZES, SPECIAL, build
from t2i_rl.models.autoregressive.engine.decode import decode_image, decode_text
from t2i_rl.models.autoregressive.engine.engine import Engine, EngineOptions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GUIDANCE = 5.0
CHUNK = 8  # images at a time in T2I-R1's script: a rank holds one prompt, whose group is 8 (its split of 32 rows never binds)
PLAIN = f"plain loop, {CHUNK} at a time"
PLAIN_AT_ONCE = "plain loop, all at once"


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


def image_variants(model, ids, mask, device, compile_too: bool) -> tuple[dict, dict[str, Engine]]:
    """Name -> call for the image phase in the model's own dtype, slowest tricks first; and the engines by name."""
    count, seeds = model.config.vision_config.num_image_tokens, list(range(len(ids)))
    options = EngineOptions(max_rows=CHUNK, graphs=False)
    steps = {f"static cache, packed weights, {CHUNK} at a time": options}
    steps["+ all rows that fit"] = options = replace(options, max_rows=None)
    if device.type == "cuda":
        steps["+ CUDA graph"] = options = replace(options, graphs=True)
    if compile_too:
        steps["+ compiled halves of a layer"] = replace(options, compile=True)
    engines = {name: Engine(settings) for name, settings in steps.items()}

    def ours(engine: Engine):
        engine.load(model)
        settings = {"count": count, "special": SPECIAL, "guidance_scale": GUIDANCE}
        return decode_image(engine, ids, mask, seeds, **settings).tokens

    variants = {
        "transformers generate": lambda: plain.transformers_images(model, ids, mask, GUIDANCE),
        PLAIN: lambda: plain.plain_images(model, ids, mask, SPECIAL, GUIDANCE, CHUNK),
        PLAIN_AT_ONCE: lambda: plain.plain_images(model, ids, mask, SPECIAL, GUIDANCE, len(ids)),
    }
    return variants | {name: lambda engine=engine: ours(engine) for name, engine in engines.items()}, engines


def floors(engine: Engine, rows: int, prefix: int, count: int, device) -> dict[str, float]:
    """Seconds below which the image phase cannot go: bytes that its steps must read over copy bandwidth, and their products over the
    rate of a large product. `floor` has, for each step, the greater of the two."""
    bandwidth, rate = measure.copy_bandwidth(device), measure.matmul_rate(engine.dtype, device)
    weights = engine.weights.bytes_per_step()
    flops = 2 * rows * weights / engine.dtype.itemsize
    memory = [(weights + rows * engine.cache_bytes(prefix + step)) / bandwidth for step in range(count)]
    return {
        "bandwidth": bandwidth,
        "matmul_rate": rate,
        "memory": sum(memory),
        "compute": count * flops / rate,
        "floor": sum(max(step, flops / rate) for step in memory),
    }


def bench(size: str, args, device) -> dict:
    """Every variant of both phases, each dtype's side by side in every round."""
    ids, mask = conversations(size, args.prompts, args.group, args.prefix, device)
    rows, plans, calls = [], [], {}
    for dtype in args.dtypes:
        model = build(size, getattr(torch, dtype), device)
        images, engines = image_variants(model, ids, mask, device, args.compile)
        count = model.config.vision_config.num_image_tokens
        for name, function in images.items():
            row = {
                "name": name,
                "dtype": dtype,
                "peak_gib": measure.peak_gib(function, device),
            }  # the first call: warm-up
            if name in engines:
                row["floors"] = floors(engines[name], 2 * len(ids), ids.shape[1], count, device)
            rows.append(row)
            calls["images", dtype, name] = function
        for name, function in plan_variants(model, size, args, device).items():
            function()
            plans.append({"name": name, "dtype": dtype})
            calls["plans", dtype, name] = function
    times = measure.interleaved(calls, device, args.repeats)
    for phase, measured in (("images", rows), ("plans", plans)):
        for row in measured:
            row["seconds"] = times[phase, row["dtype"], row["name"]]
    return {"size": size, "images": len(ids), "image_tokens": count, "rows": rows, "plans": plans}


def plan_variants(model, size: str, args, device) -> dict:
    """Phase 1: the plain loop, each row reading its own prompt, and the prompt shared by its group."""
    ids, mask = conversations(size, args.prompts, 1, args.prefix, device)
    every, every_mask = ids.repeat_interleave(args.group, 0), mask.repeat_interleave(args.group, 0)
    seeds, engine = list(range(len(every))), Engine(EngineOptions())
    settings = {"max_tokens": args.plan_tokens, "eos": -1}
    return {
        PLAIN: lambda: plain.plain_text(model, every, every_mask, args.plan_tokens, CHUNK),
        PLAIN_AT_ONCE: lambda: plain.plain_text(model, every, every_mask, args.plan_tokens, len(every)),
        "engine, own prompts": lambda: decode_text(engine.load(model), every, every_mask, seeds, **settings),
        "engine, prompt shared by its group": lambda: decode_text(engine.load(model), ids, mask, seeds, **settings),
    }


def ratios_to(rows: list[dict], row: dict) -> list[str]:
    """How many times as fast a row is as the plain loops of its own dtype, in chunks and at once; empty where one was not measured."""
    cells = []
    for name in (PLAIN, PLAIN_AT_ONCE):
        loop = next((other for other in rows if (other["name"], other["dtype"]) == (name, row["dtype"])), None)
        values = measure.ratios(loop["seconds"], row["seconds"]) if loop else ()
        cells.append("{:.2f}x [{:.2f}, {:.2f}]".format(*values) if values else "not measured")
    return cells


def table(result: dict) -> str:
    lines = [
        f"### {result['size']}: {result['images']} images of {result['image_tokens']} tokens\n",
        f"`{result['command']}` on {result['machine']}, torch {result['torch']}. Medians of {len(result['rows'][0]['seconds'])} interleaved "
        "rounds; ratios are taken round by round, [least, greatest], and between two of one dtype.\n",
        *([f"{result['note']}\n"] if "note" in result else []),
        f"| image phase | dtype | images/s | tokens/s | peak GiB | times plain ({CHUNK} at a time) | times plain (all at once) | roofline | floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        median = statistics.median(row["seconds"])
        shares = [
            f"{100 * row['floors'][key] / median:.0f} %" if "floors" in row else "" for key in ("memory", "floor")
        ]
        rate = result["images"] / median
        numbers = [f"{rate:.2f}", f"{rate * result['image_tokens']:.0f}", f"{row['peak_gib']:.2f}"]
        cells = [row["name"], row["dtype"], *numbers, *ratios_to(result["rows"], row), *shares]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        f"\n| plan phase | dtype | seconds | times plain ({CHUNK} at a time) | times plain (all at once) |",
        "|---|---|---|---|---|",
    ]
    for row in result["plans"]:
        cells = [
            row["name"],
            row["dtype"],
            f"{statistics.median(row['seconds']):.2f}",
            *ratios_to(result["plans"], row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "step" in result:
        step = result["step"]
        total = step["seconds"]
        shares = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in step["phases"].items())
        lines.append(
            f"\nA whole GRPO step ({step['rows']} rows): {total:.1f} s, peak {step['peak_gib']:.1f} GiB; {shares}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), required=True)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=40, help="tokens of the longest conversation")
    parser.add_argument("--plan-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (takes minutes to compile)")
    parser.add_argument("--step", action="store_true", help="a whole GRPO step too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    result = bench(args.size, args, device)
    if args.step:
        result["step"] = grpo_step(args.size, args, device)
    given = {key.replace("_", "-"): value for key, value in vars(args).items() if value != parser.get_default(key)}
    written = {key: " ".join(value) if isinstance(value, list) else value for key, value in given.items()}
    flags = [f"--{key}" if value is True else f"--{key} {value}" for key, value in written.items() if key != "out"]
    result["command"] = " ".join(["python experiments/bench_rollout/run.py", *flags])
    result["machine"] = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads of {cpu_name()}, {'with' if has_bfloat16() else 'without'} bfloat16 instructions"
    )
    result["torch"] = torch.__version__
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{device.type}_{args.size}.json"
    path.write_text(json.dumps(result, indent=1))
    print(table(result))
    if args.out == RESULTS:
        tables = [table(json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json"), key=_place)]
        (HERE / "table.md").write_text("\n\n".join(tables) + "\n")


def _place(path: Path) -> tuple:
    device, size = path.stem.split("_")
    return device, list(SIZES).index(size)


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself; one that does not makes float32 of it first, which gains nothing."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cpu_name() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    return found[0].split(":")[1].strip() if found else platform.processor()


if __name__ == "__main__":
    main()
