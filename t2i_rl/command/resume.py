"""`ckpt_path=last`: find the newest run with the same settings, and go on in its folder or evaluate it in another."""

from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Quote
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from t2i_rl.command.overrides import quoted
from t2i_rl.core.checkpoints import LAST, PREVIOUS, newest_whole
from t2i_rl.core.errors import UserError

COMPARED = ("method", "model", "reward", "data", "seed", "watch")
# of a config.yaml; ValueError: it is no UTF-8, or holds a broken number
UNREADABLE = (OSError, ValueError, KeyError, YAMLError, OmegaConfBaseException)
OF_DRAWING = ("interleave", "judge")  # settings of a method that change nothing of what was trained
WAY_PAST = ("on_nonfinite",)  # what a stopped run may go on with


def continue_in_place(arguments: list[str], conf: Path) -> list[str]:
    """The arguments, with what `last` stands for spelled out.

    task=train goes on in the folder of the newest run with these settings, unless hydra.run.dir names one. Every other
    task reads that run's checkpoint and writes into a folder of its own: the run keeps its results.

    Raises:
        UserError: no run with these settings has a checkpoint, or a sweep was asked to resume.
    """
    given = get_args_parser().parse_args(arguments)
    if given.multirun:
        raise UserError("ckpt_path=last goes on with one run: give one job's settings without -m")
    cfg = _compose(given, conf)
    folders = [item.split("=", 1)[1].strip("'\"") for item in arguments if item.startswith("hydra.run.dir=")]
    if cfg.hydra.runtime.choices.task != "train":
        found = newest_whole(_newest_run(cfg, OF_DRAWING) / "checkpoints")
        print(f"last checkpoint: {found}")
        return [
            f"ckpt_path={quoted(str(found), Quote.single)}" if item == "ckpt_path=last" else item for item in arguments
        ]
    if not folders:
        found = _newest_run(cfg)
        print(f"going on in {found}")
        place = arguments.index("ckpt_path=last")
        return [*arguments[:place], f"hydra.run.dir={quoted(str(found), Quote.single)}", *arguments[place:]]
    if not any((Path(folders[0]) / "checkpoints" / name).is_file() for name in (LAST, PREVIOUS)):
        raise UserError(f"{folders[0]} holds no checkpoints/last.ckpt to go on from")
    return arguments


def _newest_run(cfg: DictConfig, ignored: tuple[str, ...] = ()) -> Path:
    outputs, unread = Path(cfg.paths.root_dir) / "outputs" / "train", []
    checkpoints = [path for name in (LAST, PREVIOUS) for path in outputs.glob(f"*/checkpoints/{name}")]
    for checkpoint in sorted(checkpoints, key=_changed, reverse=True):
        run = checkpoint.parents[1]
        try:
            saved = _compared(OmegaConf.load(run / "config.yaml"), ignored)
        except UNREADABLE as error:  # made by another version, or cut short: it hides no other run
            unread.append(f"{run.name} ({type(error).__name__})")
            continue
        if saved == _compared(cfg, ignored):
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


def _compared(cfg: DictConfig, ignored: tuple[str, ...]) -> dict:
    """What a run is known by.

    Raises:
        KeyError: one of these settings is not there.
    """
    if not isinstance(cfg, DictConfig):
        raise KeyError("it holds no settings")
    return {key: _plain(cfg, key, ignored) for key in COMPARED}


def _plain(cfg: DictConfig, key: str, ignored: tuple[str, ...]):
    if key not in cfg:
        raise KeyError(key)
    if not OmegaConf.is_config(cfg[key]):
        return cfg[key]
    settings = OmegaConf.to_container(cfg[key], resolve=True)
    if not isinstance(settings, dict):
        return settings
    return {name: value for name, value in settings.items() if name not in (*ignored, *WAY_PAST)}


def _compose(given, conf: Path) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    place = (
        f"hydra.searchpath=[{quoted(Path(given.config_dir).absolute().as_uri(), Quote.single)}]"
        if given.config_dir
        else None
    )
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        overrides = [*given.overrides, *([place] if place else [])]
        cfg = compose(given.config_name or "config", overrides=overrides, return_hydra_config=True)
    GlobalHydra.instance().clear()
    return cfg
