"""`ckpt_path=`: a checkpoint says what wrote it, so a command takes method and model from it, or is refused before any
weight loads."""

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
from t2i_rl.core.places import PACKAGE
from t2i_rl.core.recipes import plain
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
    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    path = _as_written(given.get("ckpt_path", ""))
    if given.get("task") not in DRAWING or not Path(path).is_file() or "experiment" in given:
        return arguments
    facts = about(read_checkpoint(path))
    place = next(number for number, argument in enumerate(arguments) if argument.startswith("ckpt_path="))
    return [*arguments[:place], *_missing_choices(facts, given), *arguments[place:]]


def _as_written(value: str) -> str:
    """The path that an override spells, which may stand in Hydra's quotes."""
    if not value or Path(value).exists():
        return value
    try:
        return str(OverridesParser.create().parse_override(f"ckpt_path={value}").value())
    except HydraException:  # complained about elsewhere
        return value


def _missing_choices(facts: Mapping, given: Mapping[str, str]) -> Iterator[str]:
    if "method" not in given and facts.get("method"):
        yield f"method={facts['method']}"
        yield from _missing_settings("method", facts.get("decides", {}), given)
    model = dict(facts.get("model") or {})
    if "model" not in given and model.get("name"):
        yield f"model={model['name']}"
        settings = {name: model[name] for name in ("path", "revision", "dtype") if model.get(name) is not None}
        if "path" in given or _ships(settings.get("path", "")):
            settings.pop("path", None)
        yield from _missing_settings("model", settings, given)


def _missing_settings(group: str, settings: Mapping, given: Mapping[str, str]) -> Iterator[str]:
    for name, value in settings.items():
        where = f"{group}.{name}"
        if not any(key == where or key.startswith(f"{where}.") for key in given):
            yield f"{where}={in_words_of_hydra(value)}"


def _ships(path: str) -> bool:
    """Whether a model comes with the package, here or where the checkpoint was written; its config then knows where it
    lies."""
    return Path(path).parts[-3:-1] == (PACKAGE.name, "weights")


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
    task = cfg.task._target_.split(".")[-2]
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
    for name, there in facts.get("decides", {}).items():
        here = plain(cfg.method.get(name))
        if name not in NOT_COMPARED and _of_consequence(name, here) != _of_consequence(name, there):
            named = f"method={facts['method']} " if facts.get("method") else ""
            otherwise = f"leave method= and method.{name} out, and the checkpoint's are taken; or " * (task in DRAWING)
            raise UserError(
                f"{where} was trained with method.{name}={in_words_of_hydra(there)}, not {in_words_of_hydra(here)}: "
                f"{otherwise}give {named}method.{name}={in_words_of_hydra(there)}"
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
    if model and model.get("class") != cfg.model._target_:
        name = model.get("name")
        raise UserError(
            f"ckpt_path={cfg.ckpt_path} was trained on model={name} ({model.get('path')}), and this command takes "
            f"{cfg.model._target_.rpartition('.')[2]} ({cfg.model.get('path')}): take model={name}"
        )
