"""What an item is given, and how it says that its time is over."""

from dataclasses import dataclass
from pathlib import Path

CUT = 75  # exit code of an item that saw its time end before its work (sysexits' EX_TEMPFAIL)


class OutOfTime(Exception):
    """What is left to do does not fit into the time that is left."""


@dataclass(frozen=True)
class Terms:
    """What an item is given.

    Args:
        sizes: `real`, or `tiny` for a trial.
        device: `cuda` or `cpu`.
        seconds: after which it is stopped.
        out: the folder that files go to.
    """

    sizes: str
    device: str
    seconds: float
    out: Path
