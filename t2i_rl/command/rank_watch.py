"""Ranks of one run end together: each watches rank 0, rank 0 watches all, and who sees another gone says so.

A collective does not: it waits for half an hour for a rank that is gone, and Lightning's own observer ends the main
process with SIGKILL, without a word. Ranks that Lightning starts are children of rank 0 (or of the first of their
machine). Those of torchrun and srun meet in the run's folder, where each holds a lock.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2i_rl.command.provenance import finish, read_record
from t2i_rl.core import stopping
from t2i_rl.core.folders import Lock
from t2i_rl.core.ranks import LAUNCHED_BY, global_rank, is_main_process, launcher, world_size

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_END_ITSELF = 5  # the main thread may be about to raise, with more to say
SECONDS_TO_FINISH = 60


class RankWatch:
    """One rank's watch over the others; `lost` is what it saw."""

    def __init__(self, out: Path):
        self.out, self.launcher = out, launcher()
        self.children: list[subprocess.Popen] = []
        self.lost: str | None = None
        self._seen, self._over = threading.Event(), threading.Event()
        self._lock = Lock(out, f".lock_rank_{global_rank()}")
        self._met: set[int] = set()

    def start(self) -> None:
        """Begin to watch; ends this process at once if rank 0 is gone already."""
        if self.launcher in ("torchrun", "srun", "hand") and not is_main_process():
            self._lock.take()
        if self.launcher != "none":
            threading.Thread(target=self._watch, daemon=True, name="rank-watch").start()

    def watch_children(self, children: list[subprocess.Popen]) -> None:
        """Watch the ranks that Lightning has started; takes the place of its own observer."""
        self.children = children
        threading.Thread(target=self._watch, daemon=True, name="rank-watch").start()

    def has_peers(self) -> bool:
        """Whether there are other ranks."""
        return bool(self.children) or self.launcher != "none"

    def reason(self) -> str | None:
        """Which rank is gone, after some seconds for it to end: the network knows before the operating system says."""
        self._seen.wait(SECONDS_TO_END_ITSELF - 1)
        return self.lost

    def stop(self, finished: bool) -> None:
        """End the watch, and the ranks that are children of this one: by itself each of them, or by force."""
        self._over.set()
        deadline = time.monotonic() + (SECONDS_TO_FINISH if finished else SECONDS_TO_END_ITSELF)
        for child in self.children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if finished:  # else the lock stays behind as it is when this process ends: the sign that it failed
            self._lock.release()

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self.lost = self._gone()
            if self.lost:
                self._seen.set()
                self._end()
                return

    def _gone(self) -> str | None:
        if self.children:
            return next(filter(None, map(_how_it_ended, range(1, len(self.children) + 1), self.children)), None)
        if self.launcher == "lightning":
            parent = int(os.environ[LAUNCHED_BY])
            return f"rank 0 (process {parent}) is gone" if os.getppid() != parent else None
        if is_main_process():
            return next(filter(None, map(self._left, range(1, world_size()))), None)
        status = (read_record(self.out) or {}).get("status")
        if status == "running" and (gone := self._left(0)):
            return gone
        return f"rank 0 {status}" if 0 in self._met and status in ("failed", "stopped") else None

    def _left(self, rank: int) -> str | None:
        """Who had the lock of a rank that was here, and ended without giving it back."""
        lock = Lock(self.out, f".lock_rank_{rank}" if rank else ".lock")
        if lock.holder():
            self._met.add(rank)
            return None
        left = lock.left_behind() if rank in self._met else None
        return f"rank {rank} ({left}) is gone" if left else None

    def _end(self) -> None:
        """Give the main thread time to end by itself: it may wait in a collective for ever, or have raised already."""
        if self._over.wait(SECONDS_TO_END_ITSELF if self.launcher != "lightning" else 0):
            return
        line = f"{self.lost}; rank {global_rank()} ends with it"
        print(f"error: {line}", file=sys.stderr, flush=True)
        facts = read_record(self.out)
        if facts and facts.get("status") == "running":
            finish(self.out, facts, "failed", line)
        for child in self.children:
            child.kill()
        os._exit(1)


@contextmanager
def ranks_end_together(out: Path) -> Iterator[RankWatch]:
    """Watch over the ranks of the run in `out`, those that Lightning starts in here among them."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    watch, observer = RankWatch(out), subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = watch.watch_children
    if watch.launcher != "lightning":
        os.environ[LAUNCHED_BY] = str(os.getpid())
    watch.start()
    finished = False
    try:
        yield watch
        finished = True
    finally:
        subprocess_script._launch_process_observer = observer
        watch.stop(finished)


def _how_it_ended(rank: int, child: subprocess.Popen) -> str | None:
    """What is wrong with a rank's end; None while it runs, where all is well, and where the run was asked to stop."""
    code = child.poll()
    if not code or stopping.asked() is not None:
        return None
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}, see its error"
    memory = " (the kernel does so where memory is short)" if code == -signal.SIGKILL else ""
    return f"rank {rank} (process {child.pid}) {how}{memory}"
