"""What this process was asked to do, and what became of it.

The command line and Hydra's callbacks, which Hydra makes, both read and write it.
"""

from dataclasses import dataclass, field

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from t2i_rl.core.errors import UserError

REFUSALS = (UserError, HydraException, OmegaConfBaseException)  # said in one line, without a traceback


@dataclass
class Session:
    """One command.

    command: its words, as typed.
    tracebacks: whether HYDRA_FULL_ERROR=1 asks for the traceback of a refusal.
    refusals: of a single run, what ends it in one line: Hydra would print it in words of its own.
    failures: names of the jobs of a sweep that did not finish.
    """

    command: list[str] = field(default_factory=list)
    tracebacks: bool = False
    refusals: list[Exception] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


session = Session()
