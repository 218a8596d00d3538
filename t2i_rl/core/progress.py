"""How far long work is: a bar where somebody watches, else a line now and then for a log."""

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import Progress as Bar

from t2i_rl.core.ranks import is_main_process

SECONDS = 30.0


def watched() -> bool:
    """Whether standard output is a terminal: not under nohup, Slurm, CI or tee."""
    return Console().is_terminal


def duration(seconds: float) -> str:
    """`45 s`, `12 min 05 s`, `3 h 07 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


class Lines:
    """Lines about work of many parts: after the first part, then every `seconds`, then at the end.

    Args:
        name: what is done.
        total: how many parts there are; None where there is no end.
        unit: what a part is called.
        done: parts that were done before.
    """

    def __init__(self, name: str, total: int | None, unit: str, done: int = 0, seconds: float = SECONDS):
        self.name, self.total, self.unit, self.before, self.seconds = name, total, unit, done, seconds
        self.started = time.monotonic()
        self.said_at: float | None = None

    def say(self, done: int, facts: str = "") -> None:
        """Print a line if one is due."""
        now = time.monotonic()
        if self.said_at is None or now - self.said_at >= self.seconds or done == self.total:
            self.said_at = now
            print(self.line(done, now - self.started, facts), flush=True)

    def line(self, done: int, spent: float, facts: str = "") -> str:
        """One line: how far, what was measured, the time it took, and the time left."""
        of_total = f" of {self.total}" if self.total else ""
        parts = [f"{self.name}: {self.unit} {done}{of_total}", facts, duration(spent)]
        if self.total and self.before < done < self.total:
            parts.append(f"about {duration(spent / (done - self.before) * (self.total - done))} left")
        return ", ".join(part for part in parts if part)


class ProgressCounter:
    """`with ProgressCounter("drawing", 200, "image") as progress: progress.advance(64)`.

    The main process shows it; the others say nothing. The arguments are those of `Lines`.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, seconds: float = SECONDS):
        self.done = done
        self.bar = Bar(disable=not (watched() and is_main_process()))
        self.task = self.bar.add_task(name, total=total, completed=done)
        self.lines = None if watched() or not is_main_process() else Lines(name, total, unit, done, seconds)

    def advance(self, parts: int = 1, facts: str = "") -> None:
        """So many parts more are done."""
        self.done += parts
        self.bar.update(self.task, completed=self.done)
        if self.lines is not None and parts:
            self.lines.say(self.done, facts)

    def __enter__(self) -> "ProgressCounter":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def tracked(work: Sequence, name: str, unit: str) -> Iterator:
    """The items of `work`, each counted once what follows it in the loop is done."""
    with ProgressCounter(name, len(work), unit) as progress:
        for item in work:
            yield item
            progress.advance()
