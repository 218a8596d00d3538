"""`ckpt_path=last`: find the newest run with the same settings, and go on in its folder or evaluate it in another."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from t2i_rl.command.overrides import quoted
from t2i_rl.core.checkpoints import LAST, PREVIOUS, newest_whole
from t2i_rl.core.errors import UserError
from t2i_rl.core.old_names import names_now
from t2i_rl.core.places import ships
from t2i_rl.core.stated import STATED
from t2i_rl.core.used_settings import plain, with_defaults

COMPARED = ("method", "model", "reward", "data", "seed", "watch")
# of a config.yaml; ValueError: it is no UTF-8, or holds a broken number; ImportError: it names a class that has gone
UNREADABLE = (OSError, ValueError, KeyError, ImportError, YAMLError, OmegaConfBaseException)
OF_DRAWING = ("interleave", "judge")  # settings of a method that change nothing of what was trained
WAY_PAST = ("on_nonfinite",)  # what a stopped run may go on with


def continue_in_place(arguments: list[str], conf: Path) -> list[str]:
    """The arguments, with what `last` stands for spelled out.

    task=train goes on in the folder of the newest run with these settings, unless hydra.run.dir names one. Every other
    task reads that run's checkpoint and writes into a folder of its own: the run keeps its results.

    Raises:
        UserError: no run with these settings has a checkpoint, or a sweep was asked to resume.
    """
    parsed = get_args_parser().parse_args(arguments)
    if parsed.multirun:
        raise UserError("ckpt_path=last goes on with one run: give one job's settings without -m")
    cfg = _composed(parsed, conf)
    folders = [item.split("=", 1)[1].strip("'\"") for item in arguments if item.startswith("hydra.run.dir=")]
    if cfg.hydra.runtime.choices.task != "train":
        checkpoint = newest_whole(_newest_run(cfg, OF_DRAWING) / "checkpoints")
        print(f"last checkpoint: {checkpoint}")
        named = f"ckpt_path={quoted(str(checkpoint), Quote.single)}"
        return [named if item == "ckpt_path=last" else item for item in arguments]
    if not folders:
        run = _newest_run(cfg)
        print(f"going on in {run}")
        position = arguments.index("ckpt_path=last")
        return [*arguments[:position], f"hydra.run.dir={quoted(str(run), Quote.single)}", *arguments[position:]]
    if not any((Path(folders[0]) / "checkpoints" / name).is_file() for name in (LAST, PREVIOUS)):
        raise UserError(f"{folders[0]} holds no checkpoints/last.ckpt to go on from")
    return arguments


def _newest_run(cfg: DictConfig, ignored: tuple[str, ...] = ()) -> Path:
    outputs, unread = Path(cfg.paths.root_dir) / "outputs" / "train", []
    checkpoints = [path for name in (LAST, PREVIOUS) for path in outputs.glob(f"*/checkpoints/{name}")]
    for checkpoint in sorted(checkpoints, key=_changed, reverse=True):
        run = checkpoint.parents[1]
        try:
            saved = _compared(_as_now(OmegaConf.load(run / "config.yaml"), cfg), ignored)
        except UNREADABLE as error:  # made by another version, or cut short: it hides no other run
            unread.append(f"{run.name} ({type(error).__name__})")
            continue
        if saved == _compared({key: plain(cfg[key]) for key in COMPARED}, ignored):
            return run
    skipped = f" ({len(unread)} could not be read, first {unread[0]})" if unread else ""
    raise UserError(
        f"no run below {outputs} with these settings has a checkpoint{skipped}; give ckpt_path=<file> or run without it"
    )


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a link to nowhere, say
        return 0.0


def _as_now(saved: Any, cfg: DictConfig) -> dict[str, Any]:
    """What a run's config.yaml says of the settings that runs are known by, in today's form.

    Runs of 0.1 name classes as they were called, and some of them write null where a variant decided the number.

    Raises:
        KeyError: one of these settings is not there.
    """
    if not isinstance(saved, DictConfig):
        raise KeyError("it holds no settings")
    settings = names_now({key: plain(saved[key]) for key in COMPARED})
    decided = plain(cfg.presets.get(cfg.hydra.runtime.choices.method)) or {}
    if isinstance(settings["method"], dict):
        settings["method"] = {
            name: decided.get(name) if value is None else value for name, value in settings["method"].items()
        }
    return settings


def _compared(settings: dict[str, Any], ignored: tuple[str, ...]) -> dict[str, Any]:
    """What a run is known by; a setting that is not given, as one that came later, counts as its class's default."""
    known_by = {}
    for group, part in settings.items():
        left_out = (*ignored, *WAY_PAST, *STATED.get(group, ()))
        whole = _wherever_it_lies(with_defaults(part))
        named = isinstance(whole, dict)
        known_by[group] = {name: whole[name] for name in whole if name not in left_out} if named else whole
    return known_by


def _wherever_it_lies(value: Any) -> Any:
    """The same with weights that come with the package called by their name: the package may have moved since."""
    if isinstance(value, dict):
        return {name: _wherever_it_lies(item) for name, item in value.items()}
    return Path(value).name if isinstance(value, str) and ships(value) else value


def _composed(parsed: Namespace, conf: Path) -> DictConfig:
    """The config that Hydra will compose of these arguments, with Hydra's own part."""
    overrides = list(parsed.overrides)
    if parsed.config_dir:
        folder = Path(parsed.config_dir).absolute().as_uri()
        overrides.append(f"hydra.searchpath=[{quoted(folder, Quote.single)}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose(parsed.config_name or "config", overrides=overrides, return_hydra_config=True)
    GlobalHydra.instance().clear()
    return cfg
