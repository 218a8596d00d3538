"""Items for the queue's tests; a process of their own imports this file alone, so it imports little."""

import time
from types import SimpleNamespace

from experiments.gpu.terms import OutOfTime


def lines(measured) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in measured.values.items())


def _quick(measured, terms) -> None:
    print("a word", flush=True)
    measured.keep("answer", 42)
    (terms.out / "sd_tiny.tar.gz").write_bytes((terms.out / "source.tar.gz").read_bytes())


def _slow(measured, terms) -> None:
    """Ten measurements of which a lease of a few seconds has time for three."""
    for number in range(10):
        if str(number) not in measured.values:
            measured.keep(str(number), terms.device)
            time.sleep(0.01 if len(measured.values) < 3 or measured.values.get("fast") else 60)


def _broken(measured, terms) -> None:
    measured.keep("half", 1)
    raise RuntimeError("a bug in the measurement")


def _tired(measured, terms) -> None:
    measured.keep("first", 1)
    raise OutOfTime("the second does not fit")


quick, slow, broken, tired = (SimpleNamespace(run=run, table=lines) for run in (_quick, _slow, _broken, _tired))
