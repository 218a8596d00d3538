"""The command line: the manual page, composition, errors in one line."""

import os
import sys
import traceback

import hydra
from hydra.core.global_hydra import GlobalHydra

from t2i_rl.command.compose import arguments
from t2i_rl.command.job import job
from t2i_rl.command.manual import manual
from t2i_rl.command.messages import complain
from t2i_rl.command.session import REFUSALS, session
from t2i_rl.command.torchvision_fit import check_torchvision
from t2i_rl.core import stopping
from t2i_rl.core.places import CONF

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",  # not a line for each retry
}


def main() -> None:
    """Entry point of `python run.py` and of the console command `t2i-rl`."""
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(manual(CONF))
        else:
            with stopping.ending_in_words():
                run_command()
        sys.stdout.flush()
    except BrokenPipeError:  # `python run.py --help | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command() -> None:
    """Compose what the command line asks for and run it: one job, or those of a sweep.

    Raises:
        SystemExit: something was refused (2, after one line), or a job of a sweep failed (1).
    """
    session.command, session.tracebacks = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR") == "1"
    session.failures.clear()
    session.refusals.clear()
    # With HYDRA_FULL_ERROR=1 Hydra hands an exception on; without, it prints the exception in its own words and exits.
    # So it is 1 in here whatever the user has set. The user's own value comes back at the end, and before that for the
    # processes that DDP launches (job.nothing_left_behind): they are commands like this one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        sys.argv[1:] = arguments(sys.argv[1:])
        check_torchvision()
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
        if session.refusals:
            raise session.refusals[0]
    except REFUSALS as error:
        if session.tracebacks:
            raise
        sys.exit(complain(error))
    except BrokenPipeError as error:
        if _of_a_job(error):
            sys.exit("error: the run was stopped, since nobody reads what it prints: send its output to a file")
        raise
    except Exception as error:  # of any kind, since a command can be wrong in ways that Hydra does not foresee
        if session.tracebacks or _of_a_job(error):
            raise
        sys.exit(complain(error))
    finally:
        GlobalHydra.instance().clear()
        sys.argv[:] = session.command
        os.environ["HYDRA_FULL_ERROR"] = str(int(session.tracebacks))
    if session.failures:
        sys.exit(1)


def _of_a_job(error: Exception) -> bool:
    """Whether a job had begun, whose traceback shows a bug; before that only command and configs are read."""
    return any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
