"""What a user types, in the form that Hydra reads: texts as they stand, `null` for an empty group, no dashes."""

import re
from argparse import ArgumentParser
from os.path import exists
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from t2i_rl.command.messages import known_keys
from t2i_rl.core.choices import choices, nearest_keys
from t2i_rl.core.errors import UserError

SENTENCES = ("prompt", "prompts", "task.source")  # literal to the last sign: `null`, `1e3` and `${seed}` are words here
TEXTS = (  # literal as well, but `null` is none and `${...}` refers to another setting
    *("path", "prompts_file", "latents", "ckpt_path", "image", "images", "out", "file", "head", "exclude", "encodings"),
    *("dir", "subdir", "folder", "root_dir", "output_dir", "weights_dir", "default_root_dir", "searchpath"),
    *("task.tokens", "task.times", "fid.weights", "start_from", "model.soft_tokens", "model.vae"),
    *("processor", "tokenizer", "revision", "split", "url", "writer.model", "key_env"),
    *("name", "project", "entity", "wandb.group", "task_name", "tags", "notes"),
    *("stop", "question", "template", "yes_word", "no_word"),
    *(f"chat.{part}" for part in ("system", "instruction", "redraw", "reflect", "final_stop")),
)
LISTS = ("prompts", "tags", "searchpath")  # of the above, those that hold several
OVERRIDE = re.compile(r"(?P<key>\+{0,2}[\w./@:$-]+)=(?P<value>.*)", re.DOTALL)
ELEMENT = re.compile(r"""\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*(?=,|$)|[^,]*""", re.DOTALL)
SWEEP_FUNCTION = re.compile(r"\s*(choice|glob|interval|range|shuffle|sort|tag)\s*\(.*\)\s*", re.DOTALL)


def readable(arguments: list[str], conf: Path) -> list[str]:
    """The arguments as Hydra reads them, its own options first, then `--`, then the settings.

    Raises:
        UserError: an argument that is neither an option nor `setting=value`, a list or dict that does not end, or a
            group that a run needs and that is set to null.
    """
    options, settings = split(arguments)
    sweeping = get_args_parser().parse_args(options).multirun or "hydra.mode=MULTIRUN" in settings
    overrides = [_readable_override(typed, conf, sweeping) for typed in settings]
    for typed, override in zip(settings, overrides, strict=True):
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise UserError(f"cannot read {typed!r}: a setting is written name=value or ~name") from error
    return [*options, "--", *overrides]


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's own options, and the settings, wherever either stands.

    Raises:
        UserError: an option that Hydra does not know, or options that do not go together.
    """
    parser = get_args_parser()
    parser.error = _refuse_options
    _check_dashes(arguments, parser)
    following = [*arguments, ""][1:]
    arguments = [  # its value may be left out, and argparse would take the next setting for it
        "--info=all" if argument in ("--info", "-i") and ("=" in after or after == "--") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]
    parsed = parser.parse_intermixed_args(arguments)
    shown = [f"--{name}" for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(parsed, name)]
    if len(shown) > 1:
        raise UserError(f"{' and '.join(shown)} do not go together: take one of them")
    if parsed.resolve and not parsed.cfg:
        raise UserError("--resolve goes with --cfg job, --cfg hydra or --cfg all")
    overrides = list(parsed.overrides)
    options = []
    for argument in arguments:
        if argument in overrides:
            overrides.remove(argument)
        elif argument != "--":
            options.append(argument)
    return options, list(parsed.overrides)


def _refuse_options(message: str) -> None:
    raise UserError(f"{message} (python run.py --hydra-help lists the options)")


def _check_dashes(arguments: list[str], parser: ArgumentParser) -> None:
    """Refuse `--seed=1`, `--method iris` and `-seed 1`, of which argparse would take the last for other options."""
    known = [option for action in parser._actions for option in action.option_strings]
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for argument, following in zip(before, [*before, ""][1:], strict=True):
        option = argument.split("=", 1)[0]
        shortened = option.startswith("--") and any(name.startswith(option) for name in known)
        if not argument.startswith("-") or option in known or shortened:
            continue
        name, has_value, value = argument.lstrip("-").partition("=")
        if not has_value:
            value = following if following and not following.startswith("-") and "=" not in following else "..."
        name = name.replace("-", "_")
        near_keys = nearest_keys(name, known_keys())
        keys = [name] if name in near_keys else near_keys[:1] or [name]
        raise UserError(f"settings are written without dashes: {keys[0]}={value} instead of {argument}")


def _readable_override(typed: str, conf: Path, sweeping: bool) -> str:
    if typed.startswith("~"):
        return typed
    match = OVERRIDE.fullmatch(typed)
    if match is None:
        raise UserError(_no_setting(typed, conf))
    key, value = match["key"], match["value"]
    name = key.lstrip("+")
    sweeping = sweeping and not name.startswith("hydra.")  # over which Hydra sweeps never
    if (conf / name).is_dir():
        return f"{key}={_group_choice(name, value, conf)}"
    literal, several = _is_one_of(name, SENTENCES), _is_one_of(name, LISTS)
    if literal or _is_one_of(name, TEXTS):
        return f"{key}={_list_of_texts(value, literal) if several else _texts(value, literal, sweeping)}"
    if _parsed(value) is not None:
        return typed
    if value.lstrip().startswith(("[", "{")):
        raise UserError(
            f"cannot read {typed}: a list is written [a, b] and a dict {{a: 1}}, with quotes around what holds other "
            f"signs"
        )
    return f"{key}={_texts(value, False, sweeping)}"


def _no_setting(typed: str, conf: Path) -> str:
    name = typed.split("=")[0].strip()
    groups = [path.parent.relative_to(conf).as_posix() for path in sorted(conf.rglob(f"{name}.yaml"))] if name else []
    example = f"{groups[0]}={name}" if groups else next(iter(nearest_keys(name, known_keys())), "seed") + "=..."
    return f"{typed!r} is no setting: a setting is written name=value, without spaces around the =, such as {example}"


def _is_one_of(name: str, settings: tuple[str, ...]) -> bool:
    return any(f".{name}".endswith(f".{setting}") for setting in settings)


def _group_choice(group: str, value: str, conf: Path) -> str:
    """The value of a group, with `none` for `null`.

    Raises:
        UserError: a run needs this group.
    """
    parts = value.split(",")
    if all(part.strip().lower() != "null" for part in parts):
        return value if _parsed(value) is not None else quoted(value)
    if "none" not in choices(group):
        raise UserError(
            f"{group}=null is no choice: a run needs one of {group}; choose from {', '.join(choices(group))}"
        )
    return ",".join("none" if part.strip().lower() == "null" else part for part in parts)


def _texts(value: str, literal: bool, sweeping: bool) -> str:
    """A text as it stands; in a sweep several of them, between commas that are neither in quotes nor in an existing
    path."""
    if sweeping and not literal and exists(value):
        sweeping = False
    if not sweeping or (SWEEP_FUNCTION.fullmatch(value) and _parsed(value) is not None):
        return value if sweeping else _text(value, literal)
    return ",".join(_text(part.strip(), literal) for part in _elements(value))


def _list_of_texts(value: str, literal: bool) -> str:
    """A list whose elements are texts as they stand; any other value is left for the checks to refuse."""
    inside = value.strip()[1:-1]
    parsed = _parsed(value)
    if not (value.strip().startswith("[") and value.strip().endswith("]")) or (parsed and parsed.is_sweep_override()):
        return value if parsed is not None else quoted(value)
    return f"[{','.join(_text(part.strip(), literal) for part in _elements(inside))}]" if inside.strip() else value


def _elements(value: str) -> list[str]:
    """What stands between commas; a comma within quotes that enclose the whole of an element divides nothing."""
    elements, position = [], 0
    while position <= len(value):
        element = ELEMENT.match(value, position)
        elements.append(element[0])
        position = element.end() + 1
    return elements


def _text(value: str, literal: bool) -> str:
    """A text in the quotes that Hydra needs for it; quotes that a user wrote for Hydra stay."""
    parsed = _parsed(value)
    if parsed is None or parsed.is_sweep_override():
        return quoted(escaped(value) if literal else value)
    if isinstance(parsed._value, QuotedString) or (parsed.value() is None and not literal):
        return value
    if parsed.value() == value and not (literal and "${" in value):
        return value
    return quoted(escaped(value) if literal else value)


def escaped(text: str) -> str:
    """A text in which OmegaConf finds no reference to another setting."""
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", text)


def quoted(text: str, quote: Quote = Quote.double) -> str:
    """A text in quotes, as Hydra reads it back to the last sign."""
    return QuotedString(text, quote).with_quotes()


def _parsed(value: str) -> Override | None:
    """A value as Hydra reads it; None where it cannot."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None
