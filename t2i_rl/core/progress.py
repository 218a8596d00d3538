"""How far long work is: a bar where somebody watches, else a line now and then, which a log keeps."""

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
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Lines:
    """Lines about work of `total` parts, of which `done` were done before: after the first part, then every `seconds`,
    then after the last.

    Args:
        name: what is done; unit: what a part is called; total: None where there is no end.
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
        """One line: how far, what was measured, how long it took, and how long the rest will take at this pace."""
        parts = [
            f"{self.name}: {self.unit} {done}" + (f" of {self.total}" if self.total else ""),
            facts,
            duration(spent),
        ]
        if self.total and self.before < done < self.total:
            parts.append(f"about {duration(spent / (done - self.before) * (self.total - done))} left")
        return ", ".join(part for part in parts if part)


class Progress:
    """`with Progress("drawing", 200, "image") as progress: progress.advance(64)`, on the main process; the others say
    nothing."""

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

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()


def tracked(work: Sequence, name: str, unit: str) -> Iterator:
    """The items of `work`, each counted once what follows it in the loop is done."""
    with Progress(name, len(work), unit) as progress:
        for item in work:
            yield item
            progress.advance()
