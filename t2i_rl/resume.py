"""`ckpt_path=last`: find the newest run with the same settings and go on in its own folder, or evaluate it in another."""

from pathlib import Path

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from t2i_rl.errors import UserError

COMPARED = ("method", "model", "reward", "data", "seed", "watch")
OF_DRAWING = ("interleave", "judge")  # settings of a method that change nothing of what was trained


def continue_in_place(arguments: list[str], conf: Path) -> list[str]:
    """The arguments, with what `last` stands for spelled out.

    task=train goes on in the folder of the newest run with these settings, unless hydra.run.dir names one. Every other task
    reads that run's checkpoint and writes into a folder of its own: the run keeps its results.

    Raises:
        UserError: no run with these settings has a checkpoint, or a sweep was asked to resume.
    """
    given = get_args_parser().parse_args(arguments)
    if given.multirun:
        raise UserError("ckpt_path=last goes on with one run: give one job's settings without -m")
    cfg = _compose(given, conf)
    folders = [item.split("=", 1)[1].strip("'\"") for item in arguments if item.startswith("hydra.run.dir=")]
    if cfg.hydra.runtime.choices.task != "train":
        found = _newest_run(cfg, OF_DRAWING) / "checkpoints" / "last.ckpt"
        print(f"last checkpoint: {found}")
        return [f"ckpt_path={_quoted(found)}" if item == "ckpt_path=last" else item for item in arguments]
    if not folders:
        found = _newest_run(cfg)
        print(f"going on in {found}")
        place = arguments.index("ckpt_path=last")
        return [*arguments[:place], f"hydra.run.dir={_quoted(found)}", *arguments[place:]]
    if not (Path(folders[0]) / "checkpoints" / "last.ckpt").is_file():
        raise UserError(f"{folders[0]} holds no checkpoints/last.ckpt to go on from")
    return arguments


def _newest_run(cfg: DictConfig, ignored: tuple[str, ...] = ()) -> Path:
    outputs = Path(cfg.paths.root_dir) / "outputs" / "train"
    for checkpoint in sorted(outputs.glob("*/checkpoints/last.ckpt"), key=lambda path: -path.stat().st_mtime):
        saved = OmegaConf.load(checkpoint.parents[1] / "config.yaml")
        if all(_plain(saved, key, ignored) == _plain(cfg, key, ignored) for key in COMPARED):
            return checkpoint.parents[1]
    raise UserError(
        f"no run below {outputs} with these settings has a checkpoint; give ckpt_path=<file> or run without it"
    )


def _plain(cfg: DictConfig, key: str, ignored: tuple[str, ...]):
    if not OmegaConf.is_config(cfg[key]):
        return cfg[key]
    found = OmegaConf.to_container(cfg[key], resolve=True)
    return {name: value for name, value in found.items() if name not in ignored} if isinstance(found, dict) else found


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"


def _compose(given, conf: Path) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    place = f"hydra.searchpath=[{_quoted(Path(given.config_dir).absolute().as_uri())}]" if given.config_dir else None
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        overrides = [*given.overrides, *([place] if place else [])]
        cfg = compose(given.config_name or "config", overrides=overrides, return_hydra_config=True)
    GlobalHydra.instance().clear()
    return cfg
