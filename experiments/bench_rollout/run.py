"""How fast a rollout is, trick by trick, beside transformers' own generation and the plain loop; one process, same
weights, same prompts, and every ratio between two of one dtype.

    python experiments/bench_rollout/run.py --size tiny --step --compile
    python experiments/bench_rollout/run.py --size mid --prompts 2 --repeats 3
    python experiments/bench_rollout/run.py --size 1b --dtypes bfloat16 --step --compile

The last is for a GPU: the exact shapes of Janus-Pro-1B (experiments/gpu runs it in a few minutes).
Each writes its JSON file into results/ beside this file, and table.md anew from all of them.
"""

import argparse
import json
from pathlib import Path

import torch

from experiments.bench_rollout.bench import Settings, bench
from experiments.bench_rollout.grpo_step import grpo_step
from experiments.bench_rollout.measure import machine
from experiments.bench_rollout.sizes import SIZES
from experiments.bench_rollout.table import table
from t2i_rl.core.files import write_atomic

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def main() -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), required=True)
    parser.add_argument("--dtypes", nargs="+", default=list(default.dtypes), choices=default.dtypes)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=default.prompts)
    parser.add_argument("--group", type=int, default=default.group)
    parser.add_argument("--prefix", type=int, default=default.prefix, help="tokens of the longest conversation")
    parser.add_argument("--plan-tokens", type=int, default=default.plan_tokens)
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--chunks", type=int, help="time so many chunks of the loops that go chunk by chunk, not all")
    parser.add_argument("--only", nargs="+", help="ways to measure, by their names in the table")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (takes minutes to compile)")
    parser.add_argument("--step", action="store_true", help="a whole GRPO step too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    settings = Settings(**{name: value for name, value in vars(args).items() if name in vars(default)})
    result = bench(args.size, settings, device)
    if args.step:
        result["step"] = grpo_step(args.size, settings, device)
    given = {key.replace("_", "-"): value for key, value in vars(args).items() if value != parser.get_default(key)}
    written = {key: " ".join(value) if isinstance(value, list) else value for key, value in given.items()}
    flags = [f"--{key}" if value is True else f"--{key} {value}" for key, value in written.items() if key != "out"]
    result["command"] = " ".join(["python experiments/bench_rollout/run.py", *flags])
    result |= {"machine": machine(device), "torch": torch.__version__}
    write_atomic(args.out / f"{device.type}_{args.size}.json", json.dumps(result, indent=1))
    print(table(result))
    if args.out == RESULTS:
        tables = [table(json.loads(file.read_text())) for file in sorted(RESULTS.glob("*.json"), key=_place)]
        write_atomic(HERE / "table.md", "\n\n".join(tables) + "\n")


def _place(path: Path) -> tuple:
    device, size = path.stem.split("_")
    return device, list(SIZES).index(size)


if __name__ == "__main__":
    main()
