"""Where a command begins: the manual page at once, anything else by way of Hydra."""

import os
import sys

from t2i_rl.command.manual import manual
from t2i_rl.core.places import CONF


def main() -> None:
    """Entry point of `python run.py` and of the console command `t2i-rl`."""
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(manual(CONF))
        else:
            from t2i_rl.command.cli import run_command  # a quarter of a second that the manual page does without

            run_command()
        sys.stdout.flush()
    except BrokenPipeError:  # `python run.py --help | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
