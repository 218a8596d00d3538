"""Takes home what a lease has brought: tables and measurements into results/, done.json, weights into outputs/."""

import json
import shutil
import tarfile
from pathlib import Path

from experiments.gpu.items import ITEMS
from experiments.gpu.lease import done_of, text_of
from experiments.gpu.record import Results
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, replacing_folder, write_atomic


def collect(folder: Path, home: Path, outputs: Path) -> list[str]:
    """Copy a lease's files into `home` (done.json, results/) and `outputs` (weights, the log); returns a line for each.

    Raises:
        UserError: the folder holds no results, or those of a trial.
    """
    if not (folder / "results.json").exists():
        raise UserError(f"{folder} holds no results.json: name the folder that --out named, as it came back")
    results = Results(folder / "results.json")
    if results.sizes != "real":
        raise UserError(f"{folder} holds a trial (--sizes {results.sizes}): its numbers are no results")
    what = {item.name: item.what for item in ITEMS}
    lines = []
    for name, record in results.items.items():
        write_atomic(home / "results" / f"{name}.json", json.dumps(record, indent=1) + "\n")
        text = f"# {name}\n\n{what.get(name, '')}\n\n{text_of(record)}"
        write_atomic(home / "results" / f"{name}.md", text)
        lines.append(f"{name}: {home / 'results' / name}.md")
    if (folder / "done.json").exists():
        done = done_of(home) | read_json(folder / "done.json")
        write_atomic(home / "done.json", json.dumps(done, indent=1) + "\n")
    for archive in sorted(folder.glob("*.tar.gz")):
        lines.append(_unpacked(archive, outputs))
    if (folder / "log.txt").exists():
        outputs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "log.txt", outputs / "log.txt")
    return lines


def _unpacked(archive: Path, outputs: Path) -> str:
    """Put a model's folder under `outputs`; the line says what to do with it."""
    name = archive.name.removesuffix(".tar.gz")
    with replacing_folder(outputs / name) as temporary, tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
    return f"{name}: python run.py task=evaluate model={name} model.path={outputs / name}"
