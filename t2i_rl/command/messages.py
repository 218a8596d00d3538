"""Errors of the command line on one line: what is wrong, and what would be right."""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from t2i_rl.core.choices import choices, near, near_choice
from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF
from t2i_rl.core.stated import STATED
from t2i_rl.core.used_settings import TABLES

NOISE = (
    *("full_key:", "object_type=", "reference_type=", "Check available", "Set the env", "Config search path"),
    *("provider=", "See https://hydra.cc"),
)
# OmegaConf keeps the text of an error and not the error
OF_A_RESOLVER = "UserError raised while resolving interpolation: "


def complain(error: BaseException) -> int:
    """Print an error as one line on stderr; returns the exit code 2."""
    with suppress(BrokenPipeError):  # `2>&1 | head`: nobody reads it, and the exit code still tells
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2


def one_line(error: BaseException) -> str:
    """The message on one line; an unknown key or choice is followed by those that come close."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if cause is not None:
        return " ".join(str(cause).split("\n"))
    text = str(error).strip().removeprefix(OF_A_RESOLVER) or type(error).__name__
    if (of_hydra := _of_hydra(text, str(error.__cause__))) is not None:
        return of_hydra
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return _not_made(text, error.__cause__)
    if text.startswith("Error merging override") and error.__cause__ is not None:
        text = f"{text}: {error.__cause__}"
    lines = [line.strip() for line in text.splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(NOISE))
    hint = " (HYDRA_FULL_ERROR=1 shows where)" if error.__cause__ is not None else ""
    return text.split(", set env var HYDRA_FULL_ERROR")[0] + hint


def _of_hydra(text: str, cause: str) -> str | None:
    """What Hydra says about a command, said in the words of one who types it; None where it says something else."""
    if match := re.search(r"(?:Could not find|Could not override) '?([\w/]+)/([^/\n]+?)'?(?:\n|\.\n|\.?$)", text):
        return _no_such_choice(*match.groups())
    if match := re.search(r"Could not (override|delete)(?: from config\. The value of)? '([^']+)'", text):
        inner = re.search(rf"full_key: ({re.escape(match[2])}\.\S+)", cause)  # of a dict, the key that is not there
        return _no_such_setting(inner[1] if inner else match[2], addable=match[1] == "override")
    if match := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        keys = known_keys()
        if match[1] in keys:
            return f"{match[1]} is null already: there is nothing to leave out"
        return f"there is no setting {match[1]} to leave out{near(match[1], keys)}"
    if match := re.search(r"hydra\.runtime\.choices\.(\w+)' not found", text):
        return f"a run needs a {match[1]}; choose from {', '.join(choices(match[1]))}"
    if match := re.search(r"Ambiguous value for argument '([^=]+)=([^\n]*)'\n", text):
        key, values = match.groups()
        return f"{key}={values} are several values: -m {key}={values} makes a run of each, {key}=[{values}] is one list"
    if match := re.search(r"Sweep parameters '([^\n]*)' requires --multirun", text):
        return f"{match[1]} are several values: add -m, which makes a run of each"
    if "Config group override must be a string or a list" in text:
        return "a group takes the name of one of its files, and null is none of them; python run.py --help lists them"
    return None


def _not_made(text: str, cause: BaseException) -> str:
    """What a class said of its settings, and which class."""
    target = re.search(r"(?:call to|locating) target '([^']+)'", text)
    where = re.search(r"full_key: (\S+)", text)
    named = " ".join(part for part in (where and where[1], target and f"({target[1].rpartition('.')[2]})") if part)
    return (
        f"{named or 'a part'} takes no such settings: {' '.join(str(cause).split())} (HYDRA_FULL_ERROR=1 shows where)"
    )


def _no_such_setting(name: str, addable: bool) -> str:
    keys, parent = known_keys(), name.rpartition(".")[0]
    siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent and "._" not in key]
    added = f" (to add it: +{name}=...)" if addable else ""
    others = f"; {parent} has {', '.join(siblings)}" if parent and siblings else ""
    return f"there is no setting {name}{near(name, keys, others + added)}"


def _no_such_choice(group: str, name: str) -> str:
    if group.startswith("hydra/"):
        return f"there is no {group}={name} here; plugins come with an extra: pip install -e '.[sweep]' or '.[slurm]'"
    if not (CONF / group).is_dir():
        return f"there is no {group}={name}, nor a group {group}; python run.py --help lists the groups"
    elsewhere = [
        f"{path.parent.relative_to(CONF).as_posix()}={path.stem}" for path in sorted(CONF.rglob(f"{name}.yaml"))
    ]
    hint = near_choice(group, name) or (f": did you mean {' or '.join(elsewhere)}?" if elsewhere else "")
    return f"there is no {group}={name}{hint}; choose from {', '.join(choices(group))}"


def known_keys() -> list[str]:
    """Dotted names of all settings of the composition with the groups that the command chooses, and the groups."""
    chosen = [part for part in sys.argv[1:] if (CONF / part.replace("=", "/", 1)).with_suffix(".yaml").is_file()]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", chosen), resolve=False)

    settings = {name: value for name, value in config.items() if name not in TABLES}
    stated = {f"{group}.{name}" for group, names in STATED.items() for name in names}  # of classes: nobody sets these
    groups = [path.name for path in CONF.iterdir() if path.is_dir() and path.name not in config]
    return [*(key for key in _dotted(settings) if key not in stated), *groups]


def _dotted(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
