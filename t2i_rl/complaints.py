"""Errors of the command line on one line: what is wrong, and what would be right."""

import re
import sys
from difflib import get_close_matches

from omegaconf import OmegaConf

from t2i_rl.errors import UserError


def complain(error: Exception) -> int:
    """Print an error as one line on stderr; returns the exit code 2."""
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2


def one_line(error: BaseException) -> str:
    """The message on one line; an unknown key or choice is followed by those that come close."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    text = str(cause or error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"there is no setting {found[1]}{_near(found[1], known_keys(), f' (to add it: +{found[1]}=...)')}"
    if found := re.search(r"(?:Could not find|Could not override) '?([\w/]+)/([^'/\s]+)'?", text):
        group, name = found.groups()
        if group.startswith("hydra/"):
            return (
                f"there is no {group}={name} here; plugins come with an extra: pip install -e '.[sweep]' or '.[slurm]'"
            )
        return f"there is no {group}={name}{_near(name, choices(group))}; choose from {', '.join(choices(group))}"
    if found := re.search(r"hydra\.runtime\.choices\.(\w+)' not found", text):
        return f"a run needs a {found[1]}; choose from {', '.join(choices(found[1]))}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = (
        "full_key:",
        "object_type=",
        "reference_type=",
        "Check available",
        "Set the env",
        "Config search path",
        "provider=",
    )
    text = " ".join(line for line in lines if not line.startswith(noise)).split(", set env var HYDRA_FULL_ERROR")[0]
    hint = " (HYDRA_FULL_ERROR=1 shows where)" if cause is None and error.__cause__ is not None else ""
    return text + hint


def choices(group: str) -> list[str]:
    """Names of the configs of a group."""
    from t2i_rl.cli import CONF

    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def known_keys() -> list[str]:
    """Dotted names of all settings of the composition with the groups that the command chooses, and the groups."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from t2i_rl.cli import CONF, command

    chosen = [part for part in command[1:] if (CONF / part.replace("=", "/", 1)).with_suffix(".yaml").is_file()]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", chosen), resolve=False)

    def walk(node: dict, prefix: str = ""):
        for key, value in node.items():
            yield prefix + str(key)
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return [*walk(config), *(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in config)]


def _near(name: str, known: list[str], otherwise: str = "") -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else otherwise
