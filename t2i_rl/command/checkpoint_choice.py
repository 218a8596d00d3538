"""`ckpt_path=`: a command takes method and model from a checkpoint, or is refused before any weight loads."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig

from t2i_rl.command.overrides import escaped, quoted
from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.errors import UserError
from t2i_rl.core.old_names import name_now
from t2i_rl.core.places import ships
from t2i_rl.core.used_settings import plain, task_name
from t2i_rl.methods.identity import about, own_part

DRAWING = ("evaluate", "generate", "export", "edit")  # take a checkpoint's weights; train goes on from one
OF_TRAINING = ("lora_dropout", "init_lora_weights")  # settings of LoRA that change nothing of what is loaded
NOT_COMPARED = (
    "start_from",  # a file may have moved: its weights' hash is compared instead
    "variant",  # the settings that it decided are compared themselves
)


def with_choices_of_checkpoint(arguments: list[str]) -> list[str]:
    """The arguments of a task that draws, with the method and the model of the checkpoint where the command chooses
    none.

    Raises:
        UserError: `ckpt_path` is no checkpoint.
    """
    overrides = get_args_parser().parse_args(arguments).overrides
    typed = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    path = _as_written(typed.get("ckpt_path", ""))
    if typed.get("task") not in DRAWING or not Path(path).is_file() or "experiment" in typed:
        return arguments
    facts = about(read_checkpoint(path))
    position = next(number for number, argument in enumerate(arguments) if argument.startswith("ckpt_path="))
    return [*arguments[:position], *_missing_choices(facts, typed), *arguments[position:]]


def _as_written(value: str) -> str:
    """The path that an override spells, which may stand in Hydra's quotes."""
    if not value or Path(value).exists():
        return value
    try:
        return str(OverridesParser.create().parse_override(f"ckpt_path={value}").value())
    except HydraException:  # complained about elsewhere
        return value


def _missing_choices(facts: Mapping, typed: Mapping[str, str]) -> Iterator[str]:
    if "method" not in typed and facts.get("method"):
        settings = dict(facts.get("decides", {}))
        variant = settings.pop("variant", None)
        yield f"method={facts['method']}"
        yield from [f"variant={variant}"] if variant and "variant" not in typed else []
        yield from _missing_settings("method", settings, typed)
    model = dict(facts.get("model") or {})
    if "model" not in typed and model.get("name"):
        yield f"model={model['name']}"
        settings = {name: model[name] for name in ("path", "revision", "dtype") if model.get(name) is not None}
        if "path" in typed or ships(settings.get("path", "")):  # the model's config knows where those lie
            settings.pop("path", None)
        yield from _missing_settings("model", settings, typed)


def _missing_settings(group: str, settings: Mapping, typed: Mapping[str, str]) -> Iterator[str]:
    for name, value in settings.items():
        where = f"{group}.{name}"
        if not any(key == where or key.startswith(f"{where}.") for key in typed):
            yield f"{where}={in_words_of_hydra(value)}"


def in_words_of_hydra(value: Any) -> str:
    """A value as an override spells it, whatever characters it holds."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(escaped(value), Quote.single)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{in_words_of_hydra(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(in_words_of_hydra, value)) + "]"
    return repr(value)


def check_checkpoint(cfg: DictConfig) -> None:
    """Whether the task reads checkpoints, and this one was written by this method on this model.

    Raises:
        UserError: one line that names what differs and what to give.
    """
    task = task_name(cfg)
    if task not in (*DRAWING, "train"):
        raise UserError(
            f"task={task} reads no checkpoint: write it as a model with task=export, then take that with "
            "model.path=<folder>"
        )
    checkpoint = read_checkpoint(cfg.ckpt_path)
    if task == "train" and "optimizer_states" not in checkpoint:
        raise UserError(
            f"ckpt_path={cfg.ckpt_path} holds weights without the optimizer's state, as best.ckpt does, to draw with: "
            "training goes on from last.ckpt or step_*.ckpt"
        )
    _check_method(cfg, checkpoint, task)
    _check_model(cfg, checkpoint)


def _check_method(cfg: DictConfig, checkpoint: Mapping, task: str) -> None:
    facts, method = about(checkpoint), get_class(cfg.method._target_)
    where = f"ckpt_path={cfg.ckpt_path}"
    if not getattr(method, "keeps_as", ""):
        raise UserError(f"{method.__name__} trains nothing and reads no checkpoint: leave ckpt_path= out")
    try:
        own_part(checkpoint, method.keeps_as, method)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for name, trained_with in facts.get("decides", {}).items():
        asked_for = plain(cfg.method.get(name))
        if name not in NOT_COMPARED and _of_consequence(name, asked_for) != _of_consequence(name, trained_with):
            named = f"method={facts['method']} " if facts.get("method") else ""
            otherwise = f"leave method= and method.{name} out, and the checkpoint's are taken; or " * (task in DRAWING)
            raise UserError(
                f"{where} was trained with method.{name}={in_words_of_hydra(trained_with)}, not "
                f"{in_words_of_hydra(asked_for)}: "
                f"{otherwise}give {named}method.{name}={in_words_of_hydra(trained_with)}"
            )
    holds_adapters = any(".lora_" in name for name in checkpoint["state_dict"])
    if not facts and holds_adapters != (cfg.method.get("lora") is not None):
        fix = (
            "give its run's method.lora (method=iris_lora)" if holds_adapters else "leave method.lora out (method=iris)"
        )
        raise UserError(f"{where} holds {'adapters' if holds_adapters else 'no adapters'}: {fix}")


def _of_consequence(name: str, value: Any) -> Any:
    """What of a setting decides which weights there are."""
    if name == "lora" and value is not None:
        return {key: item for key, item in value.items() if key not in OF_TRAINING}
    if name == "text_loss_weight":
        return bool(value)
    return value


def _check_model(cfg: DictConfig, checkpoint: Mapping) -> None:
    model = about(checkpoint).get("model")
    if model and name_now(model["class"]) != cfg.model._target_:
        name = model.get("name")
        raise UserError(
            f"ckpt_path={cfg.ckpt_path} was trained on model={name} ({model.get('path')}), and this command takes "
            f"{cfg.model._target_.rpartition('.')[2]} ({cfg.model.get('path')}): take model={name}"
        )
