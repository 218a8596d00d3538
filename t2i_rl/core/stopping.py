"""Ctrl-C and SIGTERM: training saves after its step, all else ends, and a line says how to go on.

A second Ctrl-C ends the process at once, whatever it does.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from t2i_rl.core.ranks import is_main_process, launcher

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
EXIT_CODES = tuple(128 + number for number in NAMES)
SECONDS_OF_ONE_CTRL_C = 0.5  # torchrun sends its workers the signal once more, right after the terminal has


@dataclass
class _State:
    received: signal.Signals | None = None
    at: float = 0.0
    saves: bool = False  # whether somebody looks at the signal and ends the run
    line_printed: bool = False
    process: int = field(default_factory=os.getpid)


_state = _State()


@contextmanager
def listening() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what runs in here with exit code 130 or 143.

    Afterwards the former handlers come back.
    """
    global _state
    _state = _State()
    former_handlers = {number: signal.getsignal(number) for number in NAMES}
    listen()
    try:
        yield
    finally:
        for number, handler in former_handlers.items():
            _set(number, handler)


@contextmanager
def ending_in_words() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what runs in here in one line, also before and between its jobs."""
    with listening():
        try:
            yield
        except SystemExit as stop:
            if stop.code in EXIT_CODES:
                say("stopped; the same command begins anew")
            raise


def listen() -> None:
    """Take the signals back from Lightning.

    Its handlers, set when a loop begins, broadcast from within the signal.
    """
    for number in NAMES:
        _set(number, _on_signal)


def save_first(saves: bool) -> None:
    """Whether a signal is only noted from here on, because `asked` is looked at after each step."""
    _state.saves = saves
    if saves:
        _state.received = None


def asked() -> signal.Signals | None:
    """The signal that asked this process to end, if one did."""
    return _state.received


def name() -> str:
    """What ends the run, for a sentence."""
    return NAMES[_state.received or signal.SIGTERM]


def exit_code() -> int:
    """130 after Ctrl-C, 143 after SIGTERM, as a shell would have it."""
    return 128 + (_state.received or signal.SIGTERM)


def say(how_to_go_on: str) -> None:
    """One line from the main process: what stopped the run, and how it goes on.

    Only the first is printed.
    """
    if is_main_process() and not _state.line_printed:
        print(f"{name()}: {how_to_go_on}", flush=True)
    _state.line_printed = True


def how_to_go_on(cfg: DictConfig, out: Path) -> str:
    """What a stopped run has kept, and the settings that go on from there."""
    task = cfg.task._target_.split(".")[-2]
    again = f"the same command with hydra.run.dir={out}"
    checkpoint = out / "checkpoints" / "last.ckpt"
    if task == "train" and checkpoint.is_file():
        return f"saved {checkpoint}; {again} ckpt_path=last goes on from it"
    if task in ("train", "evaluate"):
        return f"stopped before any step was saved; {again} keeps the stages that are evaluated"
    if task in ("pretrain", "optimize_noise"):
        return f"stopped; {again} goes on"
    if task in ("encode", "make_irgl"):
        return f"stopped; the same command goes on in {cfg.task.out}"
    return f"stopped; the same command begins anew (what is written is in {out})"


def _set(number: int, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def _on_signal(number: int, frame: object) -> None:
    if os.getpid() != _state.process:  # forked off by a data loader, which ends it with SIGTERM
        return None if number == signal.SIGINT else _end_at_once(number)
    now = time.monotonic()
    if _state.received is not None:
        if launcher() == "torchrun" and now - _state.at < SECONDS_OF_ONE_CTRL_C:
            return
        _end_at_once(number)
    _state.received, _state.at = signal.Signals(number), now
    if not _state.saves:
        raise SystemExit(128 + number)
    if is_main_process():  # not print: the signal may have come in the middle of one
        os.write(2, f"{name()}: saving at the end of this step; a second one ends at once\n".encode())


def _end_at_once(number: int) -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar had hidden the cursor
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
