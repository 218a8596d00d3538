"""Runs the open items of the queue on whatever GPU there is for a few minutes, and collects what they brought.

    python experiments/gpu/run.py --minutes 8 --out <folder>
    python experiments/gpu/run.py --collect <folder>

README.md beside this file says what it needs and what comes back; command.py has the options.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout in place of this folder, installed or not

    from experiments.gpu.command import main

    sys.exit(main())
