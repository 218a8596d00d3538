"""Folders that runs write into: a name for each run, and a lock while somebody writes there."""

import atexit
import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig

from t2i_rl.core.errors import UserError
from t2i_rl.core.ranks import global_rank, is_main_process, launcher

SECONDS_BETWEEN_BEATS = 10
SECONDS_WITHOUT_BEAT = 60  # a holder on another machine is dead after so long without a sign of life
LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"


def run_id() -> str:
    """The time and six random letters: each run has a folder of its own, its ranks share one.

    Raises:
        UserError: these ranks were started by hand, and have no way to agree on a name.
    """
    started_by = launcher()
    if started_by == "srun":  # a job that Slurm requeues finds its folder again
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"
    letters = "".join(LETTERS[byte % len(LETTERS)] for byte in os.urandom(6))
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{letters}"
    if started_by == "torchrun":
        return _rank_0_says(name)
    if started_by == "hand":
        raise UserError("ranks that are started by hand cannot agree on a folder: give each hydra.run.dir=<folder>")
    return name


def _rank_0_says(name: str) -> str:
    """The name that rank 0 has, by way of the store that torchrun keeps for its workers."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"t2i_rl/run_id/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if global_rank() == 0:
        store.set(key, name)
    return store.get(key).decode()


class Lock:
    """Says that somebody writes into a folder, by a file that names the process and its machine.

    The kernel's lock on that file goes with its process, however that ends. Where another machine
    does not see such locks (on some network file systems), the file's time of change speaks: a
    holder renews it, and who has not for a minute is dead.
    """

    def __init__(self, folder: str | Path, name: str = ".lock"):
        self.folder = Path(folder).absolute()  # hydra.job.chdir changes the folder that a relative path begins in
        self.path = self.folder / name
        self._file: int | None = None
        self._released = threading.Event()

    def take(self) -> str | None:
        """Take the lock; returns who has it already, or None where it is ours now.

        Raises:
            OSError: nothing can be written there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        holder = self._holder(file, exclusive=True)
        if holder is not None:
            os.close(file)
            return holder
        if not self._is_there(file):  # whoever had it gave it back, and took the file away, since we opened it
            os.close(file)
            return self.take()
        self._file = file
        facts = {"host": socket.gethostname(), "pid": os.getpid()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(facts).encode(), 0)
        threading.Thread(target=self._beat, args=(file,), daemon=True).start()
        return None

    def holder(self) -> str | None:
        """Who has the lock; None where nobody has it."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return None
        try:
            return self._holder(file, exclusive=False)
        finally:
            os.close(file)

    def left_behind(self) -> str | None:
        """Who had the lock and ended without giving it back; else None."""
        try:
            facts = _facts(self.path.read_bytes())
        except OSError:
            return None
        return f"process {facts['pid']} on {facts['host']}" if facts and self.holder() is None else None

    def release(self) -> None:
        """Give the lock back, if this process has it."""
        if self._file is None:
            return
        self._released.set()
        with contextlib.suppress(OSError):  # a folder that is gone: closing gives the lock back all the same
            self.path.unlink()
        os.close(self._file)
        self._file = None

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False

    def _holder(self, file: int, exclusive: bool) -> str | None:
        facts = _facts(os.pread(file, 4096, 0))
        holder = f"process {facts['pid']} on {facts['host']}" if facts else "another process"
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return holder
        except OSError:  # no locks here; and in a container the next process may have the number of the last
            return holder if facts and _is_alive(facts) and self.age() < SECONDS_WITHOUT_BEAT else None
        if not facts or facts["host"] == socket.gethostname():
            return None
        return holder if self.age() < SECONDS_WITHOUT_BEAT else None

    def age(self) -> float:
        """Seconds since the last sign of life, by the file system's clock: two machines' differ."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".now") as probe:
                now = os.stat(probe.name).st_mtime
        except OSError:  # a folder that may only be read, or a full disk
            now = time.time()
        return now - self.path.stat().st_mtime

    def _beat(self, file: int) -> None:
        while not self._released.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):  # the next beat may come through
                os.utime(file)


def _is_alive(facts: dict) -> bool:
    """Whether the kernel knows a process of that number; nobody can say so of another machine's."""
    if facts["host"] != socket.gethostname():
        return True
    try:
        os.kill(facts["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        pass
    return True


def _facts(content: bytes) -> dict | None:
    try:
        facts = json.loads(content)
        return facts if isinstance(facts["pid"], int) and isinstance(facts["host"], str) else None
    except (ValueError, KeyError, TypeError):  # released, or cut short by a kill
        return None


_locks: dict[Path, Lock] = {}  # of this process


@atexit.register
def _give_all_back() -> None:
    for lock in _locks.values():
        lock.release()


def _key(folder: str | Path, name: str) -> Path:
    return Path(os.path.abspath(folder), name)


def claim(folder: str | Path, setting: str, name: str = ".lock") -> None:
    """Lock a folder until `give_back`, or until this process ends.

    A holder on another machine that shows no new sign of life within a minute is taken for dead.

    Raises:
        UserError: a live process writes there; the line names it and the `setting` to change.
        OSError: nothing can be written there.
    """
    key = _key(folder, name)
    if key in _locks:
        return
    lock = Lock(folder, name)
    holder = lock.take()
    if holder and not holder.endswith(f" on {socket.gethostname()}") and holder != "another process":
        print(f"{folder}: waiting for a sign of life of {holder}", flush=True)
        holder = _after_a_minute(lock)
    if holder:
        raise UserError(f"{folder} is in use by {holder}: take another {setting}, or wait until that one ends")
    _locks[key] = lock


def _after_a_minute(lock: Lock) -> str | None:
    """Who has the lock once its holder has either shown a sign of life or missed its time."""
    before = lock.path.stat().st_mtime
    while (holder := lock.take()) and lock.path.stat().st_mtime == before:
        time.sleep(1)
    return holder


def give_back(folder: str | Path, name: str = ".lock") -> None:
    """Undo `claim`."""
    lock = _locks.pop(_key(folder, name), None)
    if lock is not None:
        lock.release()


@contextlib.contextmanager
def claimed_outputs(cfg: DictConfig) -> Iterator[None]:
    """Lock what `task.out` names, beside it: whether it is there is the task's own question.

    Parts have a lock each.

    Raises:
        UserError: a live process writes there.
    """
    out = cfg.task.get("out")
    folder = Path(out).absolute().parent if out else None
    if folder is None or not is_main_process() or (Path(out).suffix and not folder.is_dir()):
        yield
        return
    name = _lock_beside(out) if cfg.task.get("parts", 1) == 1 else _lock_beside(f"{out}.part{cfg.task.part}")
    claim(folder, f"task.out than {out}", name)
    try:
        yield
    finally:
        give_back(folder, name)


def _lock_beside(path: str | Path) -> str:
    return f".{Path(path).name}.lock"


@contextlib.contextmanager
def in_turn(folder: str | Path) -> Iterator[None]:
    """Lock what is made once: whoever comes meanwhile waits for the one who makes it."""
    lock, waits = Lock(Path(folder).absolute().parent, _lock_beside(folder)), False
    while holder := lock.take():
        if not waits:
            print(f"waiting for {holder}, which writes into {folder}", flush=True)
        waits = True
        time.sleep(1)
    try:
        yield
    finally:
        lock.release()
