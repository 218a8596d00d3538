"""Where a run came from: resolved config, git commit, package versions, the exact command. The environment is never written."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from t2i_rl.evaluation.results import write_atomic

ROOT = Path(__file__).parents[1]


def is_main_process() -> bool:
    """Whether this is not one of the processes that DDP launched."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0"


def record(cfg: DictConfig, out: Path, command: list[str], overrides: list[str]) -> dict | None:
    """Write `config.yaml` and `provenance.json` (and `git.diff` where the tree is dirty); returns what was written.

    A folder that is run in again, as by a resume, keeps the entries of earlier runs under `earlier`.
    """
    if not is_main_process():
        return None
    out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(out / "provenance.json")
    write_atomic(out / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    commit, changed = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    facts = {
        "command": shlex.join([Path(sys.executable).name, *command]),
        "overrides": overrides,
        "git_commit": commit or None,
        "git_dirty": bool(changed),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "started": _now(),
        "finished": None,
        "status": "running",
        "packages": dict(sorted((item.metadata["Name"], item.version) for item in distributions())),
        "earlier": earlier,
    }
    if changed:
        write_atomic(out / "git.diff", changed + "\n")
    write_atomic(out / "provenance.json", json.dumps(facts, indent=1))
    return facts


def finish(out: Path, facts: dict | None, status: str) -> None:
    """Add how and when the run ended, and on which device."""
    if facts is None:
        return
    if "torch" in sys.modules:
        import torch

        facts["device"] = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
    write_atomic(out / "provenance.json", json.dumps({**facts, "finished": _now(), "status": status}, indent=1))


def _earlier(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    last = json.loads(path.read_text())
    return [*last.pop("earlier", []), {key: value for key, value in last.items() if key != "packages"}]


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
