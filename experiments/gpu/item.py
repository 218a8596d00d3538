"""One item of the queue, in a process of its own:

python -m experiments.gpu.item NAME TARGET --out <folder> --seconds 200 --sizes real --device cuda --device-name <name>

TARGET names a module, or an object in one (`module:object`), with `run(measured, terms)` and `table(measured)`.
"""

import argparse
import sys
from pathlib import Path
from pkgutil import resolve_name

from experiments.gpu.record import Measured, Results
from experiments.gpu.terms import CUT, OutOfTime, Terms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("target")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--sizes", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--device-name", required=True)
    given = parser.parse_args()
    target = resolve_name(given.target)
    measured = Measured(Results(given.out / "results.json"), given.name, given.device_name, target.table)
    try:
        target.run(measured, Terms(given.sizes, given.device, given.seconds, given.out))
    except OutOfTime as end:
        print(f"out of time: {end}", flush=True)
        return CUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
