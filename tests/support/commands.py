"""Commands within this process: a config composed as the command line composes it, and `python run.py` called."""

import logging
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from t2i_rl.command import cli
from t2i_rl.core.places import CONF


def composed(*overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["hydra.runtime.output_dir=out", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def call(monkeypatch, folder: Path, *arguments: str) -> int:
    """Exit code of `python run.py <arguments>` in `folder`, within this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    finally:  # Hydra sets it up for the whole process, on a stream that the test will close
        root.handlers[:] = handlers
        root.setLevel(level)
    return 0
