"""The ranks of a run end together.

Each says which one is gone, the record says it too, and no rank waits for ever.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2i_rl.command.provenance import read_record
from t2i_rl.core.ranks import LAUNCHED_BY, RANK_VARIABLES

# A rank that waits for ever, as in a collective. `main` starts another process beside it, as Lightning does.
RANK = """
import subprocess, sys, threading
from pathlib import Path
from t2i_rl.command.rank_watch import RankWatch
from t2i_rl.core.folders import Lock
out = Path(sys.argv[1])
watch = RankWatch(out)
if sys.argv[2] == "rank 0 of torchrun":
    Lock(out).take()
watch.start()
if sys.argv[2] == "main":
    other = subprocess.Popen(["sleep", "60"])
    watch.watch_children([other])
    print(other.pid, flush=True)
else:
    print("ready", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "provenance.json").write_text(json.dumps({"status": "running", "pid": 1, "host": "x"}))
    return tmp_path


def rank(out: Path, what: str, **environment: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", RANK, str(out), what], env={**kept, **environment}, **pipes)


def ending(process: subprocess.Popen, out: Path) -> str:
    """Gives what a rank says when it ends.

    The rank ends soon, with exit code 1, and with a record that says the same.
    """
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1, said
    record = read_record(out)
    assert record["status"] == "failed" and record["finished"]
    assert f"error: {record['error']}" in said and len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(("how", "named"), [(signal.SIGKILL, "killed by SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_the_process_that_started_the_ranks_says_which_was_killed(out, how, named):
    process = rank(out, "main")
    child = int(process.stdout.readline())
    os.kill(child, how)
    assert f"rank 1 (process {child})" in (said := ending(process, out)) and named in said


def test_a_rank_ends_when_the_process_that_started_it_is_gone(out):
    gone = subprocess.Popen(["true"])
    gone.wait()
    said = ending(rank(out, "rank 1", LOCAL_RANK="1", **{LAUNCHED_BY: str(gone.pid)}), out)
    assert f"rank 0 (process {gone.pid}) is gone; rank 1 ends with it" in said


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_of_torchrun_notice_each_other(out, killed):
    world = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
    ranks = [rank(out, f"rank {number} of torchrun", RANK=str(number), **world) for number in (0, 1)]
    for process in ranks:
        assert process.stdout.readline() == "ready\n"
    time.sleep(1.5)  # until they have met
    ranks[killed].kill()
    assert f"rank {killed} (process {ranks[killed].pid} on " in ending(ranks[1 - killed], out)
    ranks[killed].communicate()


def test_a_rank_ends_when_rank_0_has_failed(out):
    zero, one = (
        rank(out, f"rank {n} of torchrun", RANK=str(n), TORCHELASTIC_RUN_ID="x", WORLD_SIZE="2") for n in (0, 1)
    )
    for process in (zero, one):
        assert process.stdout.readline() == "ready\n"
    time.sleep(1.5)
    (out / "provenance.json").write_text(json.dumps({"status": "failed", "error": "a taken port"}))
    said = one.communicate(timeout=30)[1]
    zero.kill()
    zero.communicate()
    assert one.returncode == 1 and "rank 0 failed" in said
