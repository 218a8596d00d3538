"""How far a reader walks before a task begins: the jumps between files of the package, counted while a command runs.

    python -m tests.support.jumps [method=agsm model=sd3_tiny ...]     without arguments, the four commands below

A jump is a call from a function of one file of `t2i_rl` into a function of another, whatever third parties stand
between; what an import executes is none. An arrow is such a pair of files, counted once however often it is taken. An
arrow is `up` where it leads against the order of the rooms (docs/architecture.md), and `to core` where it ends on the
ground floor, which gives its answer and is left again. All are counted up to the task's `run`, and up to the
constructor of its model. The path are the files that are open when `run` begins: who called whom.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
PACKAGE = f"{ROOT}/t2i_rl/"
OF_A_FUNCTION = 1  # a flag of code objects, `inspect.CO_OPTIMIZED`
QUICK = ("debug=fdr", "evaluation.stages=[]")
ROOMS = (  # from the ground floor up; those of one row do not see each other
    ("core",),
    ("shapes", "gaussianity"),
    ("models",),
    ("rewards", "benchmarks"),
    ("evaluation", "data"),
    ("methods", "callbacks", "pretrain"),
    ("tasks",),
    ("command", "run.py"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
COMMANDS = (["method=iris"], ["method=agsm", "model=sd3_tiny"], ["method=noise_opt"], ["method=irg"])


class Walk:
    """A profile function that counts; it ends the process where the model is about to be built."""

    def __init__(self, command: str):
        self.command = command
        self.arrows: dict[tuple[str, str], int] = {}
        self.up_to_run = ""
        self.path: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not _is_ours(frame) or frame.f_code.co_name == "<module>":
            return
        caller = frame.f_back
        while caller is not None and not _is_ours(caller):
            caller = caller.f_back
        if caller is not None and not caller.f_code.co_flags & OF_A_FUNCTION:
            return  # what a module or a class body does while it is imported
        source, target = "run.py" if caller is None else _file(caller), _file(frame)
        if source != target:
            self.arrows[source, target] = self.arrows.get((source, target), 0) + 1
        if not self.up_to_run and frame.f_code.co_name == "run" and target.startswith("tasks/"):
            self.up_to_run, self.path = self.counted(), _open_files(frame)
        if target.startswith("models/") and _builds_a_model(frame):
            self.end()

    def counted(self) -> str:
        """The counts so far."""
        to_core = sum(_floor(target) == 0 for _, target in self.arrows)
        up = sum(_floor(target) > _floor(source) for source, target in self.arrows)
        jumps = sum(self.arrows.values())
        return f"{len(self.arrows)} arrows ({to_core} to core, {up} up), {jumps} jumps"

    def end(self) -> None:
        """Print the walk and end the process."""
        sys.setprofile(None)
        for (source, target), count in self.arrows.items():
            print(f"  {source} -> {target}" + (f" ({count} times)" if count > 1 else ""))
        files = {file for arrow in self.arrows for file in arrow} - {"run.py"}
        print(f"{self.command}: {' -> '.join(self.path)}")
        print(f"  up to run: {self.up_to_run}")
        print(f"  up to the model: {self.counted()}, {len(files)} files")
        sys.stdout.flush()
        os._exit(0)


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.removeprefix(PACKAGE)


def _floor(file: str) -> int:
    return FLOOR.get(file.split("/")[0], 0)


def _open_files(frame: FrameType | None) -> list[str]:
    files: list[str] = []
    while frame is not None:
        if _is_ours(frame) and _file(frame) not in files[:1]:
            files.insert(0, _file(frame))
        frame = frame.f_back
    return ["run.py", *files]


def _builds_a_model(frame: FrameType) -> bool:
    from t2i_rl.core.contracts import ImageModel
    from t2i_rl.core.loading import WEIGHTLESS  # memory is predicted with modules that have no values

    is_constructor = frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), ImageModel)
    return is_constructor and not WEIGHTLESS.get()


def walk(arguments: list[str], folder: str) -> None:
    """Run one command in this process until its model is built."""
    from t2i_rl.command.cli import main

    sys.argv = ["run.py", *arguments, *QUICK, f"hydra.run.dir={folder}"]
    sys.setprofile(Walk(" ".join(arguments)))
    main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        walk(sys.argv[3:], sys.argv[2])
    for arguments in [sys.argv[1:]] if sys.argv[1:] else COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            one = [sys.executable, "-m", "tests.support.jumps", "--in", folder, *arguments]
            subprocess.run(one, cwd=ROOT, check=False)
