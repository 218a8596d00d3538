"""Where a run came from: resolved config, commit, package versions, command, and nothing of the environment."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from t2i_rl.core.files import write_atomic
from t2i_rl.core.folders import Lock
from t2i_rl.core.ranks import is_main_process
from t2i_rl.core.used_settings import written_out

ROOT = Path(__file__).parents[2]


def record(out: Path, command: list[str], overrides: list[str], sweep: str | None = None) -> dict | None:
    """Write `provenance.json` (and `git.diff` where the tree is dirty); returns what was written.

    A folder that is run in again, as by a resume, keeps the entries of earlier runs under `earlier`. `sweep` names a
    job's sweep.
    """
    if not is_main_process():
        return None
    out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(out / "provenance.json")
    commit, diff = _git("rev-parse", "HEAD").decode(errors="replace").strip(), _git("diff", "HEAD")
    facts = {
        "command": shlex.join([Path(sys.executable).name, *command]),
        "overrides": overrides,
        "git_commit": commit or None,
        "git_dirty": bool(diff),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "sweep": sweep,
        "started": _now(),
        "finished": None,
        "status": "running",
        "error": None,
        "packages": _packages(),
        "earlier": earlier,
    }
    if diff:
        write_atomic(out / "git.diff", diff)  # its bytes: source need not be UTF-8
    write_atomic(out / "provenance.json", json.dumps(facts, indent=1))
    return facts


def write_config(cfg: DictConfig, out: Path) -> None:
    """Write `config.yaml`: every setting of the run, and where one refers to another what it refers to."""
    if is_main_process():
        write_atomic(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(written_out(cfg))))


def finish(out: Path, facts: dict | None, status: str, error: str | None = None) -> None:
    """Add how and when the run ended, with the line of what ended it, and on which device."""
    if facts is None:
        return
    if "torch" in sys.modules:
        import torch

        facts["device"] = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
    ended = {**facts, "finished": _now(), "status": status, "error": error}
    try:
        write_atomic(out / "provenance.json", json.dumps(ended, indent=1))
    except OSError as trouble:  # a full disk, say: what ended the run is the error to show, and not this one
        print(f"warning: {out}/provenance.json still says 'running': {trouble.strerror}", file=sys.stderr, flush=True)


def read_record(out: Path) -> dict | None:
    """What `provenance.json` says; None where there is none, or one that cannot be read."""
    try:
        facts = json.loads((out / "provenance.json").read_bytes())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def outcome(out: Path) -> tuple[str, str | None]:
    """Status of the run in a folder, and its error's line. `running` where no process works is `killed`."""
    facts = read_record(out)
    if facts is None:
        return "unknown", "it left no provenance.json that can be read"
    if facts.get("status") != "running":
        return str(facts.get("status")), facts.get("error")
    if Lock(out).holder():
        return "running", None
    return (
        "killed",
        f"process {facts.get('pid')} on {facts.get('host')} ended without a word (out of memory, or killed)",
    )


def _earlier(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    last = read_record(path.parent)
    if last is None:  # cut short by a crash, say
        return [{"status": "unknown", "text": path.read_bytes().decode(errors="replace")}]
    if last.get("status") == "running":  # whoever runs here now has the folder to itself
        last["status"] = "killed"
    return [*last.pop("earlier", []), {key: value for key, value in last.items() if key != "packages"}]


def _packages() -> dict[str, str]:
    """Versions by name. What is broken on the disk goes by its folder's name, without a version."""
    versions = {}
    for item in distributions():
        try:
            name, version = item.metadata["Name"], item.version
        except Exception:  # whatever a damaged METADATA raises, by the kind of damage
            name, version = None, None
        folder = getattr(item, "_path", None)
        versions[str(name or (folder.name if folder else "?"))] = str(version or "unknown")
    return dict(sorted(versions.items()))


def _git(*arguments: str) -> bytes:
    """What git prints; nothing where there is no git, or no repository."""
    if not (ROOT / ".git").exists():
        return b""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    except OSError:  # git is not installed, or may not be executed
        return b""
    return done.stdout if done.returncode == 0 else b""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
