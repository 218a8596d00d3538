"""How fast a rollout is, trick by trick, beside transformers' own generation and the plain loop; one process, same weights, same prompts.

    python experiments/bench_rollout/run.py --size tiny --step --compile
    python experiments/bench_rollout/run.py --size mid --prompts 2 --repeats 3
    python experiments/bench_rollout/run.py --size 1b --dtype bfloat16 --step --compile      (GPU: the exact shapes of Janus-Pro-1B)

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
from t2i_rl.rollout.decode import decode_image, decode_text
from t2i_rl.rollout.engine import Engine, EngineOptions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GUIDANCE = 5.0
PAPERS_CHUNK = 16  # images at a time in Janus's script and in T2I-R1


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
    """Name -> call for the image phase, slowest tricks first; and the engines by name."""
    count, seeds = model.config.vision_config.num_image_tokens, list(range(len(ids)))
    options = EngineOptions(max_rows=PAPERS_CHUNK, graphs=False)
    steps = {"static cache, packed weights": options}
    steps["+ all rows that fit"] = options = replace(options, max_rows=None)
    if device.type == "cuda":
        steps["+ CUDA graph"] = options = replace(options, graphs=True)
    if model.dtype == torch.float32:
        steps["+ bfloat16 weights and cache"] = options = replace(options, dtype="bfloat16")
    if compile_too:
        steps["+ compiled halves of a layer"] = replace(options, compile=True)
    engines = {name: Engine(settings) for name, settings in steps.items()}

    def ours(engine: Engine):
        engine.load(model)
        settings = {"count": count, "special": SPECIAL, "guidance_scale": GUIDANCE}
        return decode_image(engine, ids, mask, seeds, **settings).tokens

    variants = {
        "transformers generate": lambda: plain.transformers_images(model, ids, mask, GUIDANCE),
        f"plain loop, {PAPERS_CHUNK} at a time": lambda: plain.plain_images(model, ids, mask, SPECIAL, GUIDANCE, PAPERS_CHUNK),
        "plain loop, all at once": lambda: plain.plain_images(model, ids, mask, SPECIAL, GUIDANCE, len(ids)),
    }  # fmt: skip
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


def bench_images(size: str, args, device) -> dict:
    model = build(size, getattr(torch, args.dtype), device)
    ids, mask = conversations(size, args.prompts, args.group, args.prefix, device)
    variants, engines = image_variants(model, ids, mask, device, args.compile)
    memory = {
        name: measure.peak_gib(function, device) for name, function in variants.items()
    }  # the first call: warm-up
    times = measure.interleaved(variants, device, args.repeats)
    count, images = model.config.vision_config.num_image_tokens, len(ids)
    rows, baseline = [], f"plain loop, {PAPERS_CHUNK} at a time"
    for name, taken in times.items():
        median = statistics.median(taken)
        row = {
            "name": name,
            "seconds": taken,
            "images_per_s": images / median,
            "tokens_per_s": images * count / median,
            "peak_gib": memory[name],
            "times_plain_chunked": measure.ratios(times[baseline], taken),
            "times_plain_at_once": measure.ratios(times["plain loop, all at once"], taken),
        }
        if name in engines:
            row["floors"] = floors(engines[name], 2 * images, ids.shape[1], count, device)
            row["roofline"] = row["floors"]["memory"] / median
            row["of_floor"] = row["floors"]["floor"] / median
        rows.append(row)
    plans = bench_plans(model, size, args, device)
    return {"size": size, "dtype": args.dtype, "images": images, "image_tokens": count, "rows": rows, "plans": plans}


def bench_plans(model, size: str, args, device) -> dict:
    """Phase 1: the plain loop, each row reading its own prompt, and the prompt shared by its group."""
    ids, mask = conversations(size, args.prompts, 1, args.prefix, device)
    every, every_mask = ids.repeat_interleave(args.group, 0), mask.repeat_interleave(args.group, 0)
    seeds, engine = list(range(len(every))), Engine(EngineOptions())
    settings = {"max_tokens": args.plan_tokens, "eos": -1}
    variants = {
        "plain loop": lambda: plain.plain_text(model, every, every_mask, args.plan_tokens),
        "engine, own prompts": lambda: decode_text(engine.load(model), every, every_mask, seeds, **settings),
        "engine, prompt shared by its group": lambda: decode_text(engine.load(model), ids, mask, seeds, **settings),
    }
    for function in variants.values():
        function()
    times = measure.interleaved(variants, device, args.repeats)
    return {
        name: {"seconds": taken, "times_plain": measure.ratios(times["plain loop"], taken)}
        for name, taken in times.items()
    }


def table(result: dict) -> str:
    def ratio(value: tuple[float, float, float]) -> str:
        return f"{value[0]:.1f}x [{value[1]:.1f}, {value[2]:.1f}]"

    lines = [
        f"### {result['size']}, {result['dtype']}: {result['images']} images of {result['image_tokens']} tokens\n",
        f"`{result['command']}` on {result['machine']}, torch {result['torch']}. Medians of {len(result['rows'][0]['seconds'])} interleaved "
        "rounds; ratios are taken round by round, [least, greatest].\n",
        "| image phase | images/s | tokens/s | peak GiB | times plain (16 at a time) | times plain (all at once) | roofline | floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        roof = [f"{100 * row[key]:.0f} %" if key in row else "" for key in ("roofline", "of_floor")]
        lines.append(
            f"| {row['name']} | {row['images_per_s']:.2f} | {row['tokens_per_s']:.0f} | {row['peak_gib']:.2f} | "
            f"{ratio(row['times_plain_chunked'])} | {ratio(row['times_plain_at_once'])} | {roof[0]} | {roof[1]} |"
        )
    lines += ["\n| plan phase | seconds | times plain |", "|---|---|---|"]
    for name, row in result["plans"].items():
        lines.append(f"| {name} | {statistics.median(row['seconds']):.2f} | {ratio(row['times_plain'])} |")
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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
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
    result = bench_images(args.size, args, device)
    if args.step:
        result["step"] = grpo_step(args.size, args, device)
    given = {key.replace("_", "-"): value for key, value in vars(args).items() if value != parser.get_default(key)}
    flags = [f"--{key}" if value is True else f"--{key} {value}" for key, value in given.items() if key != "out"]
    result["command"] = " ".join(["python experiments/bench_rollout/run.py", *flags])
    result["machine"] = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads of {cpu_name()}"
    )
    result["torch"] = torch.__version__
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{device.type}_{args.size}_{args.dtype}.json"
    path.write_text(json.dumps(result, indent=1))
    print(table(result))
    if args.out == RESULTS:
        tables = [table(json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json"), key=_place)]
        (HERE / "table.md").write_text("\n\n".join(tables) + "\n")


def _place(path: Path) -> tuple:
    device, size, dtype = path.stem.split("_")
    return device, list(SIZES).index(size), dtype


def cpu_name() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    return found[0].split(":")[1].strip() if found else platform.processor()


if __name__ == "__main__":
    main()
