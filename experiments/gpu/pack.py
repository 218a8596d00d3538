"""Packs what the lent machine's Python lacks, and the commit, into build/gpu, which git ignores and `carry` takes.

    python experiments/gpu/pack.py

The packages are copied from the environment that runs this, so that the versions are those that the tests run with.
They are Python alone: one archive serves any version of Python and any processor.
"""

import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu"
ARCHIVE, COMMIT = FOLDER / "site.tar.xz", FOLDER / "commit.txt"
TREE_LIMIT = 64 * 2**20  # bytes that travel to the lent machine, the carried folder among them
BROUGHT = {  # packages that it lacks or has too old, with the least version that will do
    "transformers": "5.20",
    "diffusers": "0.42",
    "hydra-core": "1.3.2",
    "omegaconf": "2.3",
    "antlr4-python3-runtime": "4.9",
    "importlib_metadata": "8",
    "zipp": "3",
}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    COMMIT.write_text(commit_of(ROOT) + "\n")
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as tar:
        for package in BROUGHT:
            for file in distribution(package).files or []:
                if is_needed(file.parts):
                    tar.add(file.locate(), arcname=str(file))
    travels = sum(path.stat().st_size for path in [*tracked(), ARCHIVE, COMMIT] if path.is_file())
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size / 2**20:.1f} MiB; with the working tree {travels / 2**20:.1f} MiB")
    if travels > TREE_LIMIT:
        sys.exit(f"error: more than {TREE_LIMIT >> 20} MiB do not travel: make the working tree smaller")


def is_needed(parts: tuple[str, ...]) -> bool:
    """Whether a file of a package is read when it runs: no scripts, no caches, none of the sources that transformers'
    models are generated from."""
    source = parts[:2] == ("transformers", "models") and parts[-1].startswith("modular_")
    return ".." not in parts and "__pycache__" not in parts and not source


def tracked() -> list[Path]:
    """The files of the working tree that travel: git's own, and those that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with a `+` where files differ from it; where there is no git, what was packed."""
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        if asked.returncode == 0:
            changed = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True)
            return asked.stdout.strip() + "+" * bool(changed.stdout.strip())
    return COMMIT.read_text().strip() if COMMIT.exists() else "unknown"


if __name__ == "__main__":
    main()
