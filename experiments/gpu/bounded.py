"""A process that ends in time, whatever it does, and a log that stays small, whatever it prints."""

import os
import signal
import subprocess
import time
from io import BufferedReader
from pathlib import Path
from threading import Thread

HEAD, TAIL = 64 * 1024, 192 * 1024  # bytes of the log of one process: its first and its last
GRACE = 5.0  # seconds between SIGTERM and SIGKILL


class Log:
    """Copies what a process prints to the end of a file: its first bytes as they come, its last ones at its end."""

    def __init__(self, path: Path):
        self.path, self.recent = path, bytearray()

    def copy(self, stream: BufferedReader) -> None:
        """Read a stream to its end."""
        room, rest, left_out = HEAD, bytearray(), 0
        with self.path.open("ab", buffering=0) as file:
            while part := stream.read1():
                file.write(part[:room])
                rest += part[room:]
                room -= min(room, len(part))
                self.recent += part
                left_out += max(0, len(rest) - TAIL)
                for buffer in (rest, self.recent):
                    del buffer[:-TAIL]
            if left_out:
                file.write(b"\n... %d bytes are left out here ...\n" % left_out)
            file.write(rest)

    def last_lines(self, count: int) -> str:
        """What the process printed last."""
        return "\n".join(self.recent.decode(errors="replace").rstrip().splitlines()[-count:])


def run_bounded(command: list[str], seconds: float, log: Log, cwd: Path, environment: dict[str, str]) -> int | None:
    """The exit code of a command, or None where it was stopped after so many seconds; its children end with it."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    reader = Thread(target=log.copy, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_group(process)
        reader.join(GRACE)


def _end_group(process: subprocess.Popen) -> None:
    """End a process and all that it has started, which may outlive it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        until = time.monotonic() + GRACE
        while number == signal.SIGTERM and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    process.wait()
