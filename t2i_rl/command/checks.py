"""What can be known to fail before a task begins, and what no class and no task owns: each refuses the rest itself."""

import inspect
import os
import re
from collections.abc import Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, get_method
from omegaconf import DictConfig, OmegaConf

from t2i_rl.command.checkpoint_choice import check_checkpoint
from t2i_rl.command.settings import check_kinds, check_root, check_settings, class_at
from t2i_rl.core.choices import check_family, choices, load_yaml
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import check_value
from t2i_rl.core.places import CONF
from t2i_rl.core.used_settings import task_name
from t2i_rl.evaluation.stage import STAGES

READ_BY = {
    "prompt": ("generate", "judge", "edit"),
    "prompts_file": ("generate", "make_irgl"),
    "image": ("judge", "edit"),
    "latents": ("gaussianity",),
}
PRESET = re.compile(r"\$\{presets\.(\w+)\.")
WITHOUT_DATA = ("generate", "evaluate", "export")
PRECISIONS = ("16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true", "32", "64")


def check_config(cfg: DictConfig) -> None:
    """Everything that the config alone tells. No class is imported for it, so that a wrong command ends at once.

    Raises:
        UserError: one line that names the valid choices.
    """
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    check_kinds(cfg, chosen.get("task"))
    check_root(cfg)
    settings = OmegaConf.to_container(cfg, resolve=False)  # nothing is looked up: some words of conf/ import torch
    _check_variant(cfg, settings, chosen.get("variant", cfg.variant))
    _check_read(cfg)
    missing = sorted(_missing({group: settings[group] for group in groups_read(cfg)}))
    if missing:
        raise UserError(
            f"these settings have no default and must be given: {', '.join(f'{key}=...' for key in missing)}"
        )
    unknown = [stage for stage in cfg.evaluation.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"evaluation.stages holds {unknown[0]!r}; choose from {', '.join(STAGES)}")
    _check_files(cfg)
    _check_trainer(cfg)
    if needs_method(cfg, cfg.method.get("mode") == "turns") and "trains" in cfg.method and "family" in cfg.model:
        check_family(cfg.method._target_.rpartition(".")[2], cfg.method.trains, cfg.model.family)


def check_classes(cfg: DictConfig) -> None:
    """What the classes say of their settings, and the task of the whole; nothing is made yet.

    Raises:
        UserError: one line that names the valid choices.
    """
    for group in ("method", "model", "reward", "benchmark", "data", "trainer"):
        target = cfg[group].get("_target_") if cfg.get(group) else None
        if target is None:
            raise UserError(f"{group} names no class; choose from {group}={', '.join(choices(group))}")
        class_at(target, group, f"; shipped are {group}={', '.join(choices(group))}")
    if cfg.trainer.accelerator == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UserError("this trainer needs a GPU and there is none here; take trainer=auto, cpu or ddp_sim")
    if cfg.ckpt_path:
        check_checkpoint(cfg)
    check_settings(cfg, groups_read(cfg))
    for group in ("method", "model"):
        get_class(cfg[group]._target_).check_stated(cfg[group], group)
    get_class(cfg.model._target_).check(cfg.model)
    check_task = getattr(inspect.getmodule(get_method(cfg.task._target_)), "check", None)
    if check_task is not None:
        check_task(cfg)


def groups_read(cfg: DictConfig) -> list[str]:
    """The groups that a task reads."""
    return [group for group in cfg if group != "data" or task_name(cfg) not in WITHOUT_DATA]


def needs_method(cfg: DictConfig, draws_in_turns: bool) -> bool:
    """Whether a run makes its method: it trains, or draws as the method does or with what it has trained."""
    task = task_name(cfg)
    draws = draws_in_turns and task in ("generate", "evaluate")
    return task in ("train", "optimize_noise") or bool(cfg.ckpt_path) or draws


def _missing(node: dict, where: str = "") -> Iterator[str]:
    for name, value in node.items():
        if value == "???":
            yield f"{where}{name}"
        elif isinstance(value, dict):
            yield from _missing(value, f"{where}{name}.")


def _check_variant(cfg: DictConfig, settings: dict, chosen: str) -> None:
    """Whether the variant says everything that this run takes from one; a value in its place would change no number."""
    if cfg.variant != chosen:
        raise UserError(
            f"variant={cfg.variant} is a choice of a group, and a value in its place chooses nothing: in a config of "
            f"your own write `- override /variant: {cfg.variant}` among its defaults"
        )
    if cfg.method.get("variant", cfg.variant) != cfg.variant:
        raise UserError(f"method.variant={cfg.method.variant} chooses nothing: take variant={cfg.method.variant}")
    for name in dict.fromkeys(PRESET.findall(str(settings))):
        if name not in cfg.presets:
            tables = {variant: load_yaml(CONF / "variant" / f"{variant}.yaml") for variant in choices("variant")}
            known = [variant for variant, table in tables.items() if name in table["presets"]]
            raise UserError(
                f"variant must be one of {', '.join(known)} with this method and reward, not {cfg.variant!r}"
            )


def _check_read(cfg: DictConfig) -> None:
    """Whether somebody reads what is given at the root: what nobody reads would be lost without a word."""
    task = task_name(cfg)
    for key, tasks in READ_BY.items():
        if cfg[key] is not None and task not in tasks:
            raise UserError(f"{key}= is read by task={' and task='.join(tasks)}, and not by task={task}: leave it out")
    if cfg.path is not None and cfg.model.get("path") != cfg.path:
        raise UserError(f"path={cfg.path} is read by model=janus alone: take model=janus, or model.path={cfg.path}")
    if "path" in cfg.model and not OmegaConf.is_missing(cfg.model, "path") and not cfg.model.path:
        raise UserError("model=janus takes a checkpoint: path=<folder or hub id>")


def _check_files(cfg: DictConfig) -> None:
    reads_data = "data" in groups_read(cfg) and not cfg.data.get("maker")
    files = {key: cfg[key] for key in ("prompts_file", "latents")}
    files["data.path"] = OmegaConf.select(cfg, "data.path") if reads_data else None
    for key, file in files.items():
        check_value(file, str | None, key)
        if file and not os.path.exists(str(file)):  # pathlib's own raises where a name is too long
            raise UserError(f"{key}={file}: there is no such file")


def _check_trainer(cfg: DictConfig) -> None:
    if cfg.trainer.get("gradient_clip_val") is not None:
        raise UserError(
            "set method.max_grad_norm instead of trainer.gradient_clip_val: the method clips its own gradients"
        )
    if cfg.trainer.get("accumulate_grad_batches", 1) != 1:
        raise UserError(
            "set method.micro_batch_size instead of trainer.accumulate_grad_batches: it splits a rollout without "
            "changing the gradient"
        )
    if str(cfg.trainer.precision) not in PRECISIONS:
        raise UserError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {cfg.trainer.precision!r}")
