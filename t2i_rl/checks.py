"""What goes with what, refused in one line before any weight loads."""

from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from t2i_rl.errors import UserError

PRECISIONS = ("16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true", "32", "64")


def check(cfg: DictConfig) -> None:
    """Everything that can be known to fail from the config alone.

    Raises:
        UserError: one line that names the valid choices.
    """
    task = cfg.task._target_.split(".")[-2]
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(
            f"these settings have no default and must be given: {', '.join(f'{key}=...' for key in missing)}"
        )
    _check_method_and_model(cfg)
    _check_trainer(cfg)
    if task == "generate" and bool(cfg.prompt) == bool(cfg.prompts_file):
        raise UserError('task=generate takes one of prompt="three red circles" or prompts_file=<file>')
    if task == "generate" and cfg.mode not in ("plan", "direct"):
        raise UserError(f"mode must be plan or direct, not {cfg.mode!r}")
    if task == "judge" and not (cfg.image and cfg.prompt):
        raise UserError('task=judge takes image=<file> and prompt="three red circles"')
    if task == "pretrain" and Path(cfg.model.path).name != "janus_tiny":
        raise UserError("task=pretrain makes model=janus_tiny; the other models are loaded, not made")
    if cfg.ckpt_path and cfg.ckpt_path != "last" and not Path(cfg.ckpt_path).is_file():
        raise UserError(
            f"ckpt_path={cfg.ckpt_path}: there is no such file (ckpt_path=last takes the newest run with these settings)"
        )


def _check_method_and_model(cfg: DictConfig) -> None:
    method, model = get_class(cfg.method._target_), get_class(cfg.model._target_)
    if model.family not in method.trains:
        raise UserError(
            f"{method.__name__} trains {' and '.join(sorted(method.trains))} models, not {model.family} ones; "
            f"take one of model={', '.join(models_of(method.trains))}"
        )


def models_of(families: frozenset[str]) -> list[str]:
    """Names of the model configs whose class is of one of these families."""
    from t2i_rl.cli import CONF

    names = []
    for path in sorted((CONF / "model").glob("*.yaml")):
        target = OmegaConf.load(path).get("_target_")
        if target and get_class(target).family in families:
            names.append(path.stem)
    return names


def _check_trainer(cfg: DictConfig) -> None:
    if cfg.trainer.get("gradient_clip_val") is not None:
        raise UserError(
            "set method.max_grad_norm instead of trainer.gradient_clip_val: the method clips its own gradients"
        )
    if cfg.trainer.get("accumulate_grad_batches", 1) != 1:
        raise UserError(
            "set method.micro_batch_size instead of trainer.accumulate_grad_batches: it splits a rollout without changing the gradient"
        )
    if str(cfg.trainer.precision) not in PRECISIONS:
        raise UserError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {cfg.trainer.precision!r}")
    if cfg.trainer.accelerator == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UserError("this trainer needs a GPU and there is none here; take trainer=auto, cpu or ddp_sim")
