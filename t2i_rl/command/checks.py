"""What goes with what, as far as the config alone tells, refused in one line before any weight loads; what prompts and made parts tell: `part_checks`."""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from t2i_rl.command.checkpoint_choice import check_checkpoint
from t2i_rl.command.class_attributes import models_of
from t2i_rl.command.kinds import check_kinds
from t2i_rl.command.messages import choices
from t2i_rl.command.settings import check_root, check_settings, class_at
from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import check_value
from t2i_rl.core.places import CONF
from t2i_rl.evaluation.records import STAGES

READ_BY = {
    "prompt": ("generate", "judge", "edit"),
    "prompts_file": ("generate", "make_irgl"),
    "image": ("judge", "edit"),
    "latents": ("gaussianity",),
}
PRECISIONS = ("16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true", "32", "64")


def check(cfg: DictConfig) -> None:
    """Everything that can be known to fail from the config alone.

    Raises:
        UserError: one line that names the valid choices.
    """
    choices_made = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    check_kinds(cfg, choices_made.get("task"))
    task = cfg.task._target_.split(".")[-2]
    read = [
        group for group in cfg if group != "data" or task not in ("generate", "evaluate", "export")
    ]  # which take none
    check_root(cfg)
    _check_read(cfg, task)
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if key.split(".")[0] in read)
    if missing:
        raise UserError(
            f"these settings have no default and must be given: {', '.join(f'{key}=...' for key in missing)}"
        )
    unknown = [stage for stage in cfg.evaluation.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"evaluation.stages holds {unknown[0]!r}; choose from {', '.join(STAGES)}")
    turns = [stage for stage in cfg.evaluation.stages if stage.endswith("_turns")]
    if turns and task in ("train", "evaluate") and not draws_in_turns(cfg):
        raise UserError(
            f"evaluation.stages holds {turns[0]}, and only a method that interleaves draws turns: take method=irg"
        )
    if task == "generate" and bool(str(cfg.prompt or "").strip()) == bool(cfg.prompts_file):
        raise UserError('task=generate takes one of prompt="three red circles" or prompts_file=<file>')
    if task == "gaussianity" and not cfg.latents:
        raise UserError("task=gaussianity takes latents=<file>.safetensors")
    for key, file in (
        ("prompts_file", cfg.prompts_file),
        ("latents", cfg.latents),
        ("data.path", None if "data" not in read or cfg.data.get("maker") else OmegaConf.select(cfg, "data.path")),
    ):
        check_value(file, str | None, key)
        if file and not os.path.exists(str(file)):  # pathlib's own raises where a name is too long
            raise UserError(f"{key}={file}: there is no such file")
    if task == "generate" and cfg.mode not in (modes := ("turns",) if draws_in_turns(cfg) else ("plan", "direct")):
        raise UserError(f"mode must be {' or '.join(modes)}, not {cfg.mode!r}")
    if task == "judge" and not (cfg.image and cfg.prompt):
        raise UserError('task=judge takes image=<file> and prompt="three red circles"')
    if task == "pretrain" and Path(cfg.model.path).name not in cfg.task.recipes:
        raise UserError(
            f"task=pretrain makes model={', '.join(cfg.task.recipes)}; the other models are loaded, not made"
        )
    _check_trainer(cfg)
    _check_classes(cfg)
    if cfg.ckpt_path:
        check_checkpoint(cfg)
    if "path" in cfg.model and not cfg.model.path:
        raise UserError("model=janus takes a checkpoint: path=<folder or hub id>")
    check_settings(cfg, read)
    if cfg.model.get("soft_tokens"):
        get_class(cfg.model._target_).check_soft_tokens(cfg.model)
    if cfg.model.get("rollout"):
        instantiate(cfg.model.rollout)
    if task in ("train", "optimize_noise") or cfg.ckpt_path or (draws_in_turns(cfg) and task in ("generate", "evaluate")):
        _check_method(cfg)
    if task in ("train", "evaluate", "generate") and get_class(cfg.model._target_).family != "autoregressive":
        plans = [stage for stage in cfg.evaluation.stages if stage.endswith("_plan")]
        if plans or cfg.mode == "plan":
            raise UserError(
                f"a diffusion model writes no plans: {f'leave {plans[0]} out of evaluation.stages' if plans else 'set mode=direct'}"
            )
    if task == "train" and cfg.model.get("temperature") == 0:
        raise UserError(
            "model.temperature=0 draws greedily: a group of equal images teaches nothing; take a temperature above 0"
        )


def _check_read(cfg: DictConfig, task: str) -> None:
    """Whether somebody reads what is given at the root: what nobody reads would be lost without a word."""
    for key, tasks in READ_BY.items():
        if cfg[key] is not None and task not in tasks:
            raise UserError(f"{key}= is read by task={' and task='.join(tasks)}, and not by task={task}: leave it out")
    if cfg.path is not None and cfg.model.get("path") != cfg.path:
        raise UserError(f"path={cfg.path} is read by model=janus alone: take model=janus, or model.path={cfg.path}")


def learns_from_prompts(cfg: DictConfig) -> bool:
    """Whether `cfg.method` draws pictures of its own and has them judged, rather than be given some."""
    return get_class(cfg.method._target_).learns_from == "prompts"


def draws_in_turns(cfg: DictConfig) -> bool:
    """Whether `cfg.method` draws in turns of thinking, drawing and reflecting."""
    return get_class(cfg.method._target_).draws_in_turns


def watched(cfg: DictConfig) -> DictConfig:
    """`cfg.watch`, the judges of what is drawn while training; none where nothing is."""
    return cfg.watch if learns_from_prompts(cfg) else OmegaConf.create()


def _check_classes(cfg: DictConfig) -> None:
    for group in ("method", "model", "reward", "benchmark", "data", "trainer"):
        target = cfg[group].get("_target_") if cfg.get(group) else None
        if target is None:
            raise UserError(f"{group} names no class; choose from {group}={', '.join(choices(group))}")
        class_at(target, group, f"; shipped are {group}={', '.join(choices(group))}")


def _check_method(cfg: DictConfig) -> None:
    """Whether the method trains that kind of model, and its own options."""
    method, model = get_class(cfg.method._target_), get_class(cfg.model._target_)
    if model.family not in method.trains:
        raise UserError(
            f"{method.__name__} takes {' and '.join(sorted(method.trains))} models, not {model.family} ones; "
            f"take one of model={', '.join(models_of(method.trains, CONF))}"
        )
    options = OmegaConf.to_container(cfg.method, resolve=True)
    data, rewarded = get_class(cfg.data._target_), not cfg.reward._target_.endswith(".NoReward")
    gives, wanted = data.gives, method.learns_from
    if gives != wanted:
        shapes = "data=shapes_test" if method.searches_noise else "data=shapes"
        fix = {
            "pairs": "data=shapes_pairs",
            "preferences": "data=preferences",
            "trajectories": "data=irgl_shapes, or data=irgl with data.path=<folder>",
            "prompts": shapes,
        }[wanted]
        raise UserError(f"{method.__name__} learns from {wanted}, and {data.__name__} gives {gives}: take {fix}")
    if wanted == "prompts" and not rewarded:
        names = ", ".join(name for name in choices("reward") if name != "none")
        raise UserError(f"{method.__name__} learns from a reward: take one of reward={names}")
    if wanted == "trajectories" and rewarded:
        raise UserError(f"{method.__name__} learns from trajectories, without a reward: take reward=none")
    if method.draws_in_turns and wanted == "prompts":
        _check_sees_pictures(cfg, method)
    if wanted in ("pairs", "preferences"):
        _check_pairs(cfg, method, rewarded)
    _check_noise(cfg, method)
    made = instantiate({key: value for key, value in options.items() if key not in ("_target_", "judge")})
    method.check({**made, "judge": options["judge"]} if "judge" in options else made)
    half = cfg.model.get("dtype") in ("bfloat16", "float16")
    trains = wanted == "prompts" or (wanted == "trajectories" and cfg.task._target_.split(".")[-2] == "train")
    if half and trains and "lora" in options and options["lora"] is None:
        raise UserError(
            f"model.dtype={cfg.model.dtype} rounds small updates away: set model.dtype=float32 with trainer.precision=bf16-mixed and "
            "model.rollout.dtype=bfloat16, or train adapters (method=iris_lora, or method.lora={r: 16})"
        )


def _check_sees_pictures(cfg: DictConfig, method: type) -> None:
    """Whether the reward, and what is watched, read pictures and nothing else of a rollout."""
    for where, node in {"reward": cfg.reward, **{f"watch.{name}": node for name, node in watched(cfg).items()}}.items():
        for kind in _reward_classes(node):
            if not issubclass(method.draws, kind.reads):
                fix = (
                    "take reward=oracle, or another that reads pictures"
                    if where == "reward"
                    else f"remove it (~{where})"
                )
                raise UserError(
                    f"{method.__name__} judges pictures alone, and {where} ({kind.__name__}) reads more than them, or "
                    f"none: {fix}"
                )


def _reward_classes(node: DictConfig | None) -> list[type]:
    """The classes of a reward's parts, or its own.

    Raises:
        UserError: one does not say whether it reads pictures.
    """
    parts = (node.get("parts") or {"": node}).values() if node else ()
    kinds = [get_class(part._target_) for part in parts if part]
    for kind in kinds:
        if not issubclass(kind, Reward):
            raise UserError(f"{kind.__name__} must derive from t2i_rl.Reward, whose defaults say what it need not")
    return kinds


def _check_noise(cfg: DictConfig, method: type) -> None:
    """What holds for methods that look for noise, and for no other."""
    task, searches = cfg.task._target_.split(".")[-2], method.searches_noise
    if searches != (task == "optimize_noise"):
        fix = "leave task= out, the method brings its own" if searches else "take method=noise_opt or noise_search"
        raise UserError(f"task={task} and {method.__name__} do not go together: {fix}")
    if not searches:
        if cfg.regularizer.terms or cfg.regularizer.constraint:
            raise UserError(
                f"regularizer= holds noise Gaussian, and {method.__name__} optimises none: take method=noise_opt, or leave it out"
            )
        return
    if not method.needs_gradients and (cfg.regularizer.terms or cfg.regularizer.constraint):
        raise UserError(
            f"regularizer= holds noise that climbs, and {method.__name__} draws its noise from a Gaussian: leave it out"
        )
    if str(cfg.trainer.precision) not in ("32", "32-true"):
        raise UserError(
            f"trainer.precision={cfg.trainer.precision} would round noise and penalties: take trainer.precision=32-true, and model.dtype=bfloat16 for the model"
        )
    if OmegaConf.select(cfg, "trainer.strategy._target_"):
        raise UserError(
            "trainer=fsdp shards what trains, and nothing does here: take trainer=ddp, which shares out the prompts"
        )
    held_out = cfg.method.get("held_out")
    if held_out is not None and not cfg.watch.get(held_out):
        raise UserError(
            f"method.held_out={held_out} is not watched; there are {', '.join(cfg.watch) or 'none'} (watch.<name>)"
        )
    if cfg.method.eta > 0 and (
        cfg.model.get("scheduler") == "own" or getattr(get_class(cfg.model._target_), "denoiser_name", "") != "unet"
    ):
        raise UserError(
            f"method.eta={cfg.method.eta} is DDIM's added noise, and {get_class(cfg.model._target_).__name__} adds none: take method.eta=0"
        )
    judges = {"reward": cfg.reward, **{f"watch.{name}": node for name, node in watched(cfg).items()}}
    for where, node in judges.items():
        unseeing = [kind.__name__ for kind in _reward_classes(node) if not kind.needs_images]
        if unseeing:
            fix = "take another reward" if where == "reward" else f"remove it (~{where})"
            raise UserError(
                f"{where} ({unseeing[0]}) reads no pictures, and a search over noise has nothing else: {fix}"
            )
    if method.needs_gradients and cfg.reward.get("normalize", "none") != "none":
        raise UserError("reward.normalize=group has no gradient, and a case no group: take reward.normalize=none")
    blind = [kind.__name__ for kind in _reward_classes(cfg.reward) if not kind.differentiable]
    if method.needs_gradients and blind:
        names = ", ".join(name for name in choices("reward") if _differentiable(name))
        raise UserError(
            f"{method.__name__} follows the reward's gradient, which {blind[0]} has not: take one of reward={names}, or method=noise_search"
        )


def _differentiable(reward: str) -> bool:
    config = OmegaConf.load(CONF / "reward" / f"{reward}.yaml")
    parts = [item.split("@")[0] for item in config.get("defaults", ()) if "@parts." in item]
    if parts:
        return all(map(_differentiable, parts))
    return "_target_" in config and get_class(config._target_).differentiable


def _check_pairs(cfg: DictConfig, method: type, rewarded: bool) -> None:
    """What holds for every method that learns from given pictures."""
    if rewarded:
        raise UserError(f"{method.__name__} learns from {method.learns_from}, without a reward: take reward=none")
    if OmegaConf.select(cfg, "trainer.strategy._target_"):
        raise UserError("trainer=fsdp shards what learns, and that is a few megabytes here: take trainer=ddp")
    if str(cfg.trainer.precision) in ("16", "16-mixed") or cfg.model.get("dtype") == "float16":
        raise UserError(
            f"{method.__name__} adds its gradients up itself, without float16's loss scaling: take trainer.precision=bf16-mixed and model.dtype=bfloat16"
        )
    if str(cfg.trainer.precision).endswith("-true") and str(cfg.trainer.precision) != "32-true":
        raise UserError(
            f"trainer.precision={cfg.trainer.precision} rounds what learns: take trainer.precision=bf16-mixed (and model.dtype=bfloat16)"
        )


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
