"""Which configs there are, and which names come closest to one that is none."""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF

OTHER_NAMES = {  # what other trainers call it
    "learning_rate": "lr",
    "epochs": "max_steps",
    "num_train_epochs": "max_steps",
    "num_generations": "group_size",
    "beta": "kl_coef",
    "cfg_scale": "guidance_scale",
}


def load_yaml(path: Path) -> dict[str, Any]:
    """A config as it stands in its file, read by the fastest reader that there is."""
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def choices(group: str) -> list[str]:
    """Names of the configs of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def models_of(families: Collection[str]) -> list[str]:
    """Names of the model configs that are of one of these families."""
    return [name for name in choices("model") if load_yaml(CONF / "model" / f"{name}.yaml")["family"] in families]


def check_family(method: str, trains: Collection[str], family: str) -> None:
    """Whether a method of this name takes models of that family.

    Raises:
        UserError: it does not; the line names models that it takes.
    """
    if family not in trains:
        raise UserError(
            f"{method} takes {' and '.join(sorted(trains))} models, not {family} ones; take one of "
            f"model={', '.join(models_of(trains))}"
        )


def nearest_keys(name: str, known: Iterable[str]) -> list[str]:
    """The settings, three at most, that `name` may stand for: by its last part first, then by its spelling."""
    keys = [key for key in known if not key.split(".")[-1].startswith("_") and not name.startswith(f"{key}.")]
    keys.sort(key=lambda key: key.count("."))
    last = {key: key.split(".")[-1] for key in keys}
    wanted = name.split(".")[-1]
    elsewhere = OTHER_NAMES.get(wanted, wanted)
    close = get_close_matches(wanted, {part for part in last.values() if len(part) > 2}, n=3, cutoff=0.7)
    steps = (
        [key for key in keys if key == name],
        [key for key in keys if last[key] in (wanted, elsewhere)],
        [key for key in keys if plain_letters(last[key]) == plain_letters(wanted)],
        [key for key in keys if wanted in last[key].split("_")],
        [key for part in close for key in keys if last[key] == part],
        [] if "." in name else get_close_matches(name, keys, n=3, cutoff=0.7),
    )
    candidates = next((step for step in steps if step), [])
    return sorted(candidates, key=lambda key: -_shared(key, name))[:3]


def near(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`: did you mean ...?` with the settings that come close, or what is said where none does."""
    return did_you_mean(nearest_keys(name, known)) or otherwise


def near_choice(group: str, name: str) -> str:
    """`: did you mean ...?` with the configs of a group that `name` may stand for; empty where there is none.

    A config is meant by its own name whatever its dashes, by a part of it, by a word of it, or by the class that it
    makes.
    """
    names = choices(group)
    plain = {choice: plain_letters(choice) for choice in names}
    classes = {choice: plain_letters(_class_of(group, choice)) for choice in names}
    words = {word for word in re.split(r"[\W_]+", name.lower()) if len(word) > 2}
    wanted = plain_letters(name)
    steps = (
        [choice for choice in names if wanted == plain[choice]],
        [choice for choice in names if wanted and len(wanted) > 1 and wanted in plain[choice]],
        [choice for choice in names if wanted and wanted == classes[choice]],
        [choice for choice in names if len(plain[choice]) > 2 and plain[choice] in wanted],
        get_close_matches(name, names, n=3, cutoff=0.6),
        [choice for choice in names if words & set(choice.lower().split("_"))],
    )
    return did_you_mean(next((step for step in steps if step), []))


def did_you_mean(names: list[str]) -> str:
    """The first three names as a question; empty for none."""
    return f": did you mean {' or '.join(names[:3])}?" if names else ""


def plain_letters(name: str) -> str:
    """A name without its dashes, dots and capitals."""
    return re.sub(r"[\W_]", "", name.lower())


def _class_of(group: str, choice: str) -> str:
    target = load_yaml(CONF / group / f"{choice}.yaml").get("_target_")
    return str(target or "").rpartition(".")[2]


def _shared(key: str, name: str) -> int:
    """How many parts two dotted names have in common."""
    return len(set(key.split(".")) & set(name.split(".")))
