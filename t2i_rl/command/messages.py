"""Errors of the command line on one line: what is wrong, and what would be right."""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches

from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from t2i_rl.command.class_attributes import load_yaml
from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF

NOISE = (
    *("full_key:", "object_type=", "reference_type=", "Check available", "Set the env", "Config search path"),
    *("provider=", "See https://hydra.cc"),
)
OF_A_RESOLVER = (
    "UserError raised while resolving interpolation: "  # OmegaConf keeps the text of an error and not the error
)
OTHER_NAMES = {  # what other trainers call it
    "learning_rate": "lr",
    "epochs": "max_steps",
    "num_train_epochs": "max_steps",
    "num_generations": "group_size",
    "beta": "kl_coef",
    "cfg_scale": "guidance_scale",
}


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
    if (said := _of_hydra(text, str(error.__cause__))) is not None:
        return said
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
    there = f"; {parent} has {', '.join(siblings)}" if parent and siblings else ""
    return f"there is no setting {name}{near(name, keys, there + added)}"


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


def choices(group: str) -> list[str]:
    """Names of the configs of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def near_choice(group: str, name: str) -> str:
    """`: did you mean ...?` with the configs of a group that `name` may stand for; empty where there is none.

    A config is meant by its own name whatever its dashes, by a part of it, by a word of it, or by the class that it
    makes.
    """
    names = choices(group)
    plain = {choice: _plain(choice) for choice in names}
    classes = {choice: _plain(_class_of(group, choice)) for choice in names}
    words = {word for word in re.split(r"[\W_]+", name.lower()) if len(word) > 2}
    wanted = _plain(name)
    steps = (
        [choice for choice in names if wanted == plain[choice]],
        [choice for choice in names if wanted and len(wanted) > 1 and wanted in plain[choice]],
        [choice for choice in names if wanted and wanted == classes[choice]],
        [choice for choice in names if len(plain[choice]) > 2 and plain[choice] in wanted],
        get_close_matches(name, names, n=3, cutoff=0.6),
        [choice for choice in names if words & set(choice.lower().split("_"))],
    )
    return _did_you_mean(next((step for step in steps if step), []))


def _class_of(group: str, choice: str) -> str:
    target = load_yaml(CONF / group / f"{choice}.yaml").get("_target_")
    return str(target or "").rpartition(".")[2]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def known_keys() -> list[str]:
    """Dotted names of all settings of the composition with the groups that the command chooses, and the groups."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    chosen = [part for part in sys.argv[1:] if (CONF / part.replace("=", "/", 1)).with_suffix(".yaml").is_file()]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", chosen), resolve=False)

    def walk(node: dict, prefix: str = ""):
        for key, value in node.items():
            yield prefix + str(key)
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return [*walk(config), *(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in config)]


def nearest_keys(name: str, known: Iterable[str] | None = None) -> list[str]:
    """The settings, three at most, that `name` may stand for: by its last part first, then by its spelling."""
    keys = list(known_keys() if known is None else known)
    keys = [key for key in keys if not key.split(".")[-1].startswith("_") and not name.startswith(f"{key}.")]
    keys.sort(key=lambda key: key.count("."))
    last = {key: key.split(".")[-1] for key in keys}
    wanted = name.split(".")[-1]
    elsewhere = OTHER_NAMES.get(wanted, wanted)
    close = get_close_matches(wanted, {part for part in last.values() if len(part) > 2}, n=3, cutoff=0.7)
    steps = (
        [key for key in keys if key == name],
        [key for key in keys if last[key] in (wanted, elsewhere)],
        [key for key in keys if _plain(last[key]) == _plain(wanted)],
        [key for key in keys if wanted in last[key].split("_")],
        [key for part in close for key in keys if last[key] == part],
        [] if "." in name else get_close_matches(name, keys, n=3, cutoff=0.7),
    )
    candidates = next((step for step in steps if step), [])
    return sorted(candidates, key=lambda key: -_shared(key, name))[:3]


def _shared(key: str, name: str) -> int:
    """How many parts two dotted names have in common, in the order in which they stand."""
    return len(set(key.split(".")) & set(name.split(".")))


def near(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`: did you mean ...?` with the settings that come close, or what is said where none does."""
    return _did_you_mean(nearest_keys(name, known)) or otherwise


def _did_you_mean(names: list[str]) -> str:
    return f": did you mean {' or '.join(names[:3])}?" if names else ""
