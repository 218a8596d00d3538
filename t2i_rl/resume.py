"""`ckpt_path=last`: find the newest run with the same settings and go on in its own folder."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from t2i_rl.errors import UserError

COMPARED = ("method", "model", "reward", "data", "seed", "watch")


def continue_in_place(arguments: list[str], conf: Path) -> list[str]:
    """The arguments with the run folder of the newest matching run added (unless one is given).

    Raises:
        UserError: no run with these settings has a checkpoint, or a sweep was asked to resume.
    """
    if {"-m", "--multirun"} & set(arguments):
        raise UserError("ckpt_path=last goes on with one run: give one job's settings without -m")
    given = next((argument.split("=", 1)[1] for argument in arguments if argument.startswith("hydra.run.dir=")), None)
    if given is not None:
        if not (Path(given) / "checkpoints" / "last.ckpt").is_file():
            raise UserError(f"{given} holds no checkpoints/last.ckpt to go on from")
        return arguments
    wanted = _compose([argument for argument in arguments if not argument.startswith("-")], conf)
    outputs = Path.cwd() / "outputs"
    runs = sorted(outputs.glob("train/*/checkpoints/last.ckpt"), key=lambda path: -path.stat().st_mtime)
    for checkpoint in runs:
        saved = OmegaConf.load(checkpoint.parents[1] / "config.yaml")
        if all(_plain(saved, key) == _plain(wanted, key) for key in COMPARED):
            print(f"going on in {checkpoint.parents[1]}")
            return [*arguments, f"hydra.run.dir={checkpoint.parents[1]}"]
    raise UserError(
        f"no run below {outputs / 'train'} with these settings has a checkpoint; give ckpt_path=<file> or run without it"
    )


def _plain(cfg: DictConfig, key: str):
    return OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]


def _compose(overrides: list[str], conf: Path) -> DictConfig:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", overrides=overrides)
    GlobalHydra.instance().clear()
    return config
