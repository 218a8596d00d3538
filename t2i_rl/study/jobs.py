"""One job of a study: a process of its own, resumed where a killed one stopped, refused where it is stale.

Beside what the job itself writes, its folder holds `job.log` (what it printed) and `job.json`:

- `command`, `config` (the experiment's YAML as it stood) and `takes` (the sha256 of every file it took from another
  job) are what its results depend on. Where they are no longer what the study asks for, the job is stale.
- `commits` are those of the code it ran at. A job is not stale for being older than the code.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import yaml

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_object, read_text, replacing_folder, write_atomic
from t2i_rl.core.places import CONF
from t2i_rl.pretrain.card import git_commit


@dataclass(frozen=True)
class Job:
    """What Python is given to do, and the folder that it leaves its results in.

    Attributes:
        name: what messages call it.
        command: a script and its arguments.
        result: the file of `folder` that is there once the job is done.
        takes: files of other jobs that its results depend on.
        needs: jobs that have to be done first.
        drawn: folders of one and the same stage in other jobs' evaluations. The first that is whole is copied into
            this job's before it begins; the evaluator takes it over if weights, prompts, seeds and settings are the
            same, and draws it anew if not.
        root: the folder that it runs in; paths in `job.json` are relative to it.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    result: str = "results.json"
    takes: tuple[Path, ...] = ()
    needs: tuple["Job", ...] = ()
    drawn: tuple[Path, ...] = ()
    root: Path = field(default_factory=Path.cwd)

    @property
    def done(self) -> bool:
        return (self.folder / self.result).exists()

    @property
    def record(self) -> Path:
        return self.folder / "job.json"

    def facts(self) -> dict:
        """What its results depend on, as `job.json` keeps it; of the files it takes, those that are still there."""
        return {
            "command": self.shortened(shlex.join(["python", *self.command])),
            "config": experiment_of(self.command, self.root),
            "takes": {self.shortened(str(file)): sha256(file) for file in self.takes if file.exists()},
        }

    def shortened(self, text: str) -> str:
        """The text with paths below the root as they are from there."""
        return text.replace(f"{self.root.absolute()}/", "")

    def check(self) -> None:
        """See that whatever stands in the folder was made by this very job. A file taken may be gone since.

        Raises:
            UserError: the job is stale, or nothing says what made its results.
        """
        folder = self.shortened(str(self.folder))
        if not self.record.exists():
            if self.done:
                raise UserError(f"{folder} has {self.result} and no job.json that says what made it: delete the folder")
            return
        written, asked = read_object(self.record, "command", "config", "takes"), self.facts()
        others = [file for file, digest in asked["takes"].items() if written["takes"].get(file) != digest]
        if written["command"] != asked["command"]:
            origin = unlike(shlex.split(written["command"]), shlex.split(asked["command"]))
        elif written["config"] != asked["config"]:
            origin = "with other settings of its experiment (conf/experiment)"
        elif others:
            origin = f"from another {others[0]}"
        else:
            return
        raise UserError(f"{self.name}: {folder} was made {origin}: delete it, or bring that back")

    def begin(self) -> None:
        """Take over a stage that another job has drawn, and write down what this one is made by."""
        whole = [stage for stage in self.drawn if (stage / "fingerprint.json").exists()]  # which is written last
        own = [self.folder / "evaluation" / stage.name for stage in whole[:1]]
        if own and not own[0].exists():
            with replacing_folder(own[0]) as temporary:
                shutil.copytree(whole[0], temporary, dirs_exist_ok=True)
        earlier = read_object(self.record, "commits")["commits"] if self.record.exists() else []
        commits = list(dict.fromkeys([*earlier, git_commit()]))
        write_atomic(self.record, json.dumps({**self.facts(), "commits": commits}, indent=1))


def run_job(job: Job) -> None:
    """Run a job to its end on one thread, from its last checkpoint if it has one; nothing where it is done.

    Raises:
        UserError: it is stale, it fails, or it ends without its result.
    """
    job.check()
    if job.done:
        print(f"{job.name}: done before", flush=True)
        return
    job.begin()
    checkpoints = [job.folder / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous")]
    resumed = ["ckpt_path=last"] if any(file.exists() for file in checkpoints) else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (job.folder / "job.log").open("a") as log:
        command = [sys.executable, *job.command, *resumed]
        ended = subprocess.run(command, cwd=job.root, stdout=log, stderr=log, env=environment)
    if ended.returncode:
        raise UserError(f"{job.name} failed with exit code {ended.returncode}: see {job.shortened(log.name)}")
    if not job.done:
        raise UserError(f"{job.name} ended without {job.result}: see {job.shortened(log.name)}")
    print(f"{job.name}: done", flush=True)


def require_done(jobs: Sequence[Job]) -> None:
    """See that there is something to tabulate.

    Raises:
        UserError: a job is not done, or stale.
    """
    missing = [job for job in jobs if not job.done]
    if missing:
        first = f"the first is {missing[0].name} ({missing[0].shortened(str(missing[0].folder))})"
        raise UserError(f"no table: {len(missing)} of {len(jobs)} jobs are not done, {first}; run without --only-table")
    for job in jobs:
        job.check()


def commits_of(jobs: Sequence[Job]) -> list[str]:
    """The commits that jobs ran at, seven letters each, in the order of the jobs."""
    records = [read_object(job.record, "commits") for job in jobs]
    return list(dict.fromkeys(commit[:7] for record in records for commit in record["commits"]))


def unlike(before: Sequence[str], now: Sequence[str]) -> str:
    """How one command differs from another, in the words that only one of them has."""
    if sorted(before) == sorted(now):
        return "with the same settings in another order"
    old_words, new_words = ([word for word in a if word not in b] for a, b in ((before, now), (now, before)))
    return f"with {' '.join(old_words) or 'nothing'} where the study has {' '.join(new_words) or 'nothing'}"


def experiment_of(command: Sequence[str], root: Path) -> dict | None:
    """What the YAML holds that `experiment=<name>` names, in the folders of `--config-dir` or in ours; None without."""
    name = next((word.removeprefix("experiment=") for word in command if word.startswith("experiment=")), None)
    folders = [*(root / value for option, value in pairwise(command) if option == "--config-dir"), CONF]
    files = [folder / "experiment" / f"{name}.yaml" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    return yaml.safe_load(read_text(file)) if file else None


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
