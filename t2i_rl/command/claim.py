"""Before a run or a sweep begins: its folder is its own, can be written, and every rank agrees on it."""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from t2i_rl.command.messages import complain
from t2i_rl.command.session import REFUSALS, session
from t2i_rl.command.sweep import note_launch
from t2i_rl.command.troubles import folder_trouble
from t2i_rl.core import ranks, stopping
from t2i_rl.core.errors import UserError
from t2i_rl.core.folders import claim, give_back

TASKS_OF_RANKS = ("train", "evaluate", "optimize_noise")


class ClaimFolder(Callback):
    """Hydra callback: locks the folder before Hydra writes there. It ends the program: Hydra swallows exceptions."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            _check_ranks(config)
            folder = Path(config.hydra.run.dir)
            if ranks.is_main_process():
                _take(folder, "hydra.run.dir")
            else:
                with flag_override(config, ["readonly", "struct"], False):
                    config.hydra.output_subdir = None  # the main process writes it
        except Exception as error:  # whatever it is: Hydra would warn and go on
            _end(error)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            if ranks.inherits_a_number():
                ranks.stand_alone()
            _take(Path(config.hydra.sweep.dir), "hydra.sweep.dir")
            note_launch(config)
        except Exception as error:  # as above
            _end(error)
        if config.hydra.launcher._target_.endswith(".JoblibLauncher"):
            stopping.save_first(True)  # Ctrl-C reaches its workers too, and joblib would kill them while they save

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        give_back(config.hydra.sweep.dir)


def _take(folder: Path, setting: str) -> None:
    try:
        claim(folder, setting)
    except OSError as error:
        line = folder_trouble(error, folder) or f"{folder} cannot be written: {error}"
        raise UserError(line) from error


def _check_ranks(config: DictConfig) -> None:
    """One process a run where nothing is shared out over ranks; parts of one data set are a run each."""
    task, started_by = config.hydra.runtime.choices.task, ranks.launcher()
    if started_by == "none":
        if ranks.inherits_a_number():
            ranks.stand_alone()
        return
    if task in TASKS_OF_RANKS or started_by == "lightning":
        return
    if (OmegaConf.select(config, "task.parts") or 1) == 1:
        who = "somebody started by hand" if started_by == "hand" else f"{started_by} started"
        raise UserError(
            f"task={task} runs in one process, and this is one of several that {who}: start one (srun -n 1)"
        )
    ranks.stand_alone()


def _end(error: Exception) -> None:
    if session.tracebacks or not isinstance(error, REFUSALS):
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from error
    raise SystemExit(complain(error)) from error
