"""What goes with what, as far as the config alone tells, refused in one line before any weight loads; what prompts and made parts tell: `part_checks`."""

import ast
import math
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import torch
from hydra._internal.utils import _locate
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from t2i_rl.complaints import choices
from t2i_rl.errors import UserError
from t2i_rl.evaluation.results import STAGES

PRECISIONS = ("16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true", "32", "64")


def check(cfg: DictConfig) -> None:
    """Everything that can be known to fail from the config alone.

    Raises:
        UserError: one line that names the valid choices.
    """
    task = cfg.task._target_.split(".")[-2]
    read = [
        group for group in cfg if group != "data" or task not in ("generate", "evaluate", "export")
    ]  # which take none
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if key.split(".")[0] in read)
    if missing:
        raise UserError(
            f"these settings have no default and must be given: {', '.join(f'{key}=...' for key in missing)}"
        )
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to 2**32 - 1, not {cfg.seed!r}")
    for key in ("num_images", "evaluation.batch_size"):
        value = OmegaConf.select(cfg, key)
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a whole number of 1 or more, not {value!r}")
    unknown = [stage for stage in cfg.evaluation.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"evaluation.stages holds {unknown[0]!r}; choose from {', '.join(STAGES)}")
    turns = [stage for stage in cfg.evaluation.stages if stage.endswith("_turns")]
    if turns and task in ("train", "evaluate") and not interleaves(cfg):
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
        if file and not Path(file).exists():
            raise UserError(f"{key}={file}: there is no such file")
    if task == "generate" and cfg.mode not in (modes := ("turns",) if interleaves(cfg) else ("plan", "direct")):
        raise UserError(f"mode must be {' or '.join(modes)}, not {cfg.mode!r}")
    if task == "judge" and not (cfg.image and cfg.prompt):
        raise UserError('task=judge takes image=<file> and prompt="three red circles"')
    if task == "pretrain" and Path(cfg.model.path).name not in cfg.task.recipes:
        raise UserError(
            f"task=pretrain makes model={', '.join(cfg.task.recipes)}; the other models are loaded, not made"
        )
    if cfg.ckpt_path and cfg.ckpt_path != "last" and not Path(cfg.ckpt_path).is_file():
        raise UserError(
            f"ckpt_path={cfg.ckpt_path}: there is no such file (ckpt_path=last takes the newest run with these settings)"
        )
    _check_trainer(cfg)
    _check_classes(cfg)
    for group in ("method", "model", "reward", "benchmark", "data"):
        if group in read:
            _check_types(cfg[group], group)
    if "path" in cfg.model and not cfg.model.path:
        raise UserError("model=janus takes a checkpoint: path=<folder or hub id>")
    if cfg.model.get("rollout"):
        instantiate(cfg.model.rollout)
    if task in ("train", "optimize_noise") or cfg.ckpt_path or (interleaves(cfg) and task in ("generate", "evaluate")):
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


def learns_from_prompts(cfg: DictConfig) -> bool:
    """Whether `cfg.method` draws pictures of its own and has them judged, rather than be given some."""
    return getattr(get_class(cfg.method._target_), "learns_from", "prompts") == "prompts"


def interleaves(cfg: DictConfig) -> bool:
    """Whether `cfg.method` draws in turns of thinking, drawing and reflecting."""
    return getattr(get_class(cfg.method._target_), "interleaves", False)


def watched(cfg: DictConfig) -> DictConfig:
    """`cfg.watch`, the judges of what is drawn while training; none where nothing is."""
    return cfg.watch if learns_from_prompts(cfg) else OmegaConf.create()


def _check_classes(cfg: DictConfig) -> None:
    for group in ("method", "model", "reward", "benchmark", "data", "trainer"):
        target = cfg[group].get("_target_") if cfg.get(group) else None
        if target is None:
            raise UserError(f"{group} names no class; choose from {group}={', '.join(choices(group))}")
        try:
            _locate(target)
        except ImportError as error:
            raise UserError(
                f"{group}._target_={target}: there is no such class; shipped are {group}={', '.join(choices(group))}"
            ) from error


def _check_types(node: DictConfig, where: str) -> None:
    """Refuse words where the class asks for a number or a switch, and fractions where it asks for a whole number."""
    if "_target_" in node:
        try:
            hints = get_type_hints(_locate(node._target_).__init__)
        except NameError:  # names that only a type checker imports
            hints = {}
        for name, kind in hints.items():
            kinds, value = set(get_args(kind)) or {kind}, node.get(name)
            if (
                isinstance(value, str)
                and kinds & {int, float, bool}
                and not kinds - {int, float, bool, NoneType, torch.Tensor}
            ):
                raise UserError(f"{where}.{name} must be a number or true/false, not {value!r}")
            if isinstance(value, float) and int in kinds and not kinds - {int, NoneType}:
                raise UserError(f"{where}.{name} must be a whole number, not {value!r}")
    for name, child in node.items():
        if isinstance(child, float) and not math.isfinite(child):
            raise UserError(f"{where}.{name} must be a finite number, not {child}")
        if isinstance(child, DictConfig):
            _check_types(child, f"{where}.{name}")


def _check_method(cfg: DictConfig) -> None:
    """Whether the method trains that kind of model, and its own options."""
    method, model = get_class(cfg.method._target_), get_class(cfg.model._target_)
    if model.family not in method.trains:
        raise UserError(
            f"{method.__name__} takes {' and '.join(sorted(method.trains))} models, not {model.family} ones; "
            f"take one of model={', '.join(models_of(method.trains))}"
        )
    options = OmegaConf.to_container(cfg.method, resolve=True)
    data, rewarded = get_class(cfg.data._target_), not cfg.reward._target_.endswith(".NoReward")
    gives, wanted = getattr(data, "gives", "prompts"), getattr(method, "learns_from", "prompts")
    if gives != wanted:
        shapes = "data=shapes_test" if hasattr(method, "gradients") else "data=shapes"
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
    if getattr(method, "rewards_see", "") == "pictures":
        _check_sees_pictures(cfg, method)
    if wanted in ("pairs", "preferences"):
        _check_pairs(cfg, method, rewarded)
    _check_noise(cfg, method)
    if options.get("max_grad_norm") is not None and options["max_grad_norm"] <= 0:
        raise UserError(f"method.max_grad_norm must be above 0, or null, not {options['max_grad_norm']}")
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
    """Whether the reward reads pictures, and nothing else of a rollout."""
    for part in (cfg.reward.get("parts") or {"": cfg.reward}).values():
        kind = get_class(part._target_) if part else None
        sees = kind and (kind.needs_images or getattr(kind, "reads_nothing", False))
        if kind and (not sees or kind.distribution or getattr(kind, "needs_plans", False)):
            raise UserError(
                f"{method.__name__} judges pictures alone, and {kind.__name__} reads more than them, or none: take reward=oracle, or another that reads pictures"
            )


def _check_noise(cfg: DictConfig, method: type) -> None:
    """What holds for methods that look for noise, and for no other."""
    task, searches = cfg.task._target_.split(".")[-2], hasattr(method, "gradients")
    if searches != (task == "optimize_noise"):
        fix = "leave task= out, the method brings its own" if searches else "take method=noise_opt or noise_search"
        raise UserError(f"task={task} and {method.__name__} do not go together: {fix}")
    if not searches:
        if cfg.regularizer.terms or cfg.regularizer.constraint:
            raise UserError(
                f"regularizer= holds noise Gaussian, and {method.__name__} optimises none: take method=noise_opt, or leave it out"
            )
        return
    if not method.gradients and (cfg.regularizer.terms or cfg.regularizer.constraint):
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
    parts = cfg.reward.get("parts") or {"": cfg.reward}
    unseeing = [
        get_class(part._target_).__name__
        for part in parts.values()
        if part and not get_class(part._target_).needs_images
    ]
    if unseeing:
        raise UserError(
            f"{unseeing[0]} reads no pictures, and a search over noise has nothing else: take another reward"
        )
    if method.gradients and cfg.reward.get("normalize", "none") != "none":
        raise UserError("reward.normalize=group has no gradient, and a case no group: take reward.normalize=none")
    blind = [
        get_class(part._target_).__name__
        for part in parts.values()
        if part and not getattr(get_class(part._target_), "differentiable", False)
    ]
    if method.gradients and blind:
        names = ", ".join(name for name in choices("reward") if _differentiable(name))
        raise UserError(
            f"{method.__name__} follows the reward's gradient, which {blind[0]} has not: take one of reward={names}, or method=noise_search"
        )


def _differentiable(reward: str) -> bool:
    from t2i_rl.cli import CONF

    config = OmegaConf.load(CONF / "reward" / f"{reward}.yaml")
    parts = [item.split("@")[0] for item in config.get("defaults", ()) if "@parts." in item]
    if parts:
        return all(map(_differentiable, parts))
    return "_target_" in config and getattr(get_class(config._target_), "differentiable", False)


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


def models_of(families: frozenset[str]) -> list[str]:
    """Names of the model configs whose class is of one of these families."""
    from t2i_rl.cli import CONF

    targets = {path.stem: OmegaConf.load(path).get("_target_") for path in sorted((CONF / "model").glob("*.yaml"))}
    return [name for name, target in targets.items() if target and class_attribute(target, "family") in families]


def class_attribute(target: str, name: str):
    """A constant of a class, read from its source: importing every model for the sake of a name would take seconds."""
    module, _, class_name = target.rpartition(".")
    tree = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node in found.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value  # frozenset({...})
            return ast.literal_eval(value)
    return getattr(get_class(target), name)  # inherited


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
