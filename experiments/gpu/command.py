"""The queue's command line."""

import argparse
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from experiments.gpu.collect import collect
from experiments.gpu.items import ITEMS, Item
from experiments.gpu.lease import FAILED, ROOT, Lease, done_of
from experiments.gpu.pack import BROUGHT, commit_of
from t2i_rl.core.errors import UserError

HOME = Path(__file__).parent
OUTPUTS = ROOT / "outputs" / "gpu"
NEEDED = ("torch", "lightning", "peft", "safetensors", "numpy", "pillow", "rich", "psutil", "pytest", "matplotlib")


def main(
    arguments: Sequence[str] | None = None,
    items: Sequence[Item] = ITEMS,
    home: Path = HOME,
    outputs: Path = OUTPUTS,
) -> int:
    """Exit code: 0, or 1 where an item failed, or 2 where nothing could begin."""
    given = _parser().parse_args(arguments)
    try:
        if given.collect:
            print("\n".join(collect(given.collect, home, outputs)))
        elif given.list:
            print("\n".join(_list(items, done_of(home))))
        else:
            return _run(given, items, home)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python experiments/gpu/run.py", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long the GPU is there; all ends in time")
    parser.add_argument("--out", type=Path, help="folder that everything is written to: at most 8 files of 16 MB")
    parser.add_argument("--sizes", choices=("real", "tiny"), default="real", help="tiny: a trial, which is no result")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", nargs="+", default=[], metavar="ITEM", help="items to measure from the start")
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="these items and no others")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="take home what a lease has brought")
    parser.add_argument("--list", action="store_true", help="say which items are open")
    return parser


def _run(given: argparse.Namespace, items: Sequence[Item], home: Path) -> int:
    check(given, items)
    lease = Lease(
        given.minutes,
        given.out.resolve(),
        home,
        given.device,
        device_name(given.device),
        commit_of(ROOT),
        f"python experiments/gpu/run.py {shlex.join(sys.argv[1:])}",
        given.sizes,
        given.again,
    )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the item's process then ends with this one
    try:
        outcomes = lease.run([item for item in items if not given.only or item.name in given.only])
    finally:
        signal.signal(signal.SIGTERM, before)
    print((lease.out / "tables.md").read_text())
    return int(any(outcome.startswith(FAILED) for outcome in outcomes.values()))


def check(given: argparse.Namespace, items: Sequence[Item]) -> None:
    """Refuse what cannot run.

    Raises:
        UserError: an option is missing or unknown, a package is missing or too old, or there is no GPU.
    """
    if given.minutes is None or given.out is None or given.minutes <= 0:
        raise UserError("give --minutes <number above 0> --out <folder>, or --collect <folder>, or --list")
    names = [item.name for item in items]
    for name in [*given.again, *(given.only or [])]:
        if name not in names:
            raise UserError(f"there is no item {name!r}; the items are {', '.join(names)}")
    lacking = [name for name, least in (dict.fromkeys(NEEDED, "0") | BROUGHT).items() if not _has(name, least)]
    if lacking:
        raise UserError(
            f"this Python ({sys.executable}) lacks {', '.join(lacking)}: pack them at home with "
            "`python experiments/gpu/pack.py`, and unpack and run as experiments/gpu/README.md says"
        )
    if given.device == "cuda" and not shutil.which("nvidia-smi"):
        raise UserError("there is no GPU here: for a trial take --sizes tiny --device cpu")
    if given.device == "cpu" and given.sizes == "real":
        raise UserError("real sizes need a GPU: for a trial take --sizes tiny --device cpu")


def _has(name: str, least: str) -> bool:
    try:
        return _numbers(version(name)) >= _numbers(least)
    except PackageNotFoundError:
        return False


def _numbers(text: str) -> tuple[int, ...]:
    """`5.20.1+cpu` as (5, 20, 1)."""
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def device_name(device: str) -> str:
    """The GPU as its driver names it, or the CPU's architecture."""
    if device == "cpu":
        return f"CPU, {platform.machine()}"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def _list(items: Sequence[Item], done: dict[str, dict]) -> list[str]:
    states = {name: f"done on {entry['when']}, {entry['device']}, {entry['commit']}" for name, entry in done.items()}
    return [f"{item.name}: {states.get(item.name, 'open')}; {item.what}" for item in items]
