"""Which prompts train, which choose settings and which test: held-out object pairs by a fixed hash, disjoint texts, pinned by sha256."""

import hashlib
import itertools

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.shapes.scene import Wish
from t2i_rl.shapes.text import EXTRA_TASKS, GENEVAL_TASKS, enumerate_prompts

SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = {"test": 8, "validation": 4}
TEST_PERCENT = {"single_object": 50, "two_object": 50, "colors": 40}
SALT = "shapes-2"


def fraction(text: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a string: the one source of chance in the splits."""
    return int.from_bytes(hashlib.sha256(f"{SALT}|{text}".encode()).digest()[:8], "big") / 2**64


def object_pairs(prompt: Prompt) -> list[str]:
    """The unordered pairs of coloured objects that a prompt names (`red circle + blue square`)."""
    names = []
    for clause in prompt.meta["include"]:
        if "color" in clause:
            names += [f"{clause['color']} {clause['class']}"] * clause["count"]
    return sorted({" + ".join(sorted(pair)) for pair in itertools.combinations(names, 2)})


def pair_split(pair: str) -> str:
    """Where an object pair belongs: `test` and `validation` pairs are kept out of every training prompt."""
    place = 100 * fraction(f"pair|{pair}")
    if place < HELD_OUT_PERCENT["test"]:
        return "test"
    return "validation" if place < sum(HELD_OUT_PERCENT.values()) else "train"


def held_out(prompt: Prompt) -> bool:
    """Whether a prompt names a held-out pair of objects."""
    return any(pair_split(pair) != "train" for pair in object_pairs(prompt))


def split_of(prompt: Prompt) -> str:
    """The one split of a prompt: that of its held-out pairs, test before validation; for all others a fixed share of the texts
    tests (a fifth, more in small tasks) and half as many validate.
    """
    pairs = {pair_split(pair) for pair in object_pairs(prompt)} - {"train"}
    if pairs:
        return min(pairs)
    place, test = 100 * fraction(f"split|{prompt.text}"), TEST_PERCENT.get(prompt.tag, 20)
    if place < test:
        return "test"
    return "validation" if place < 1.5 * test else "train"


def train_prompts(tag: str, size: int = 32) -> list[Prompt]:
    """Every training prompt of a task."""
    return [prompt for prompt in enumerate_prompts(tag, size) if split_of(prompt) == "train"]


def select_prompts(split: str, per_task: int, tasks: tuple[str, ...] = GENEVAL_TASKS, size: int = 32) -> list[Prompt]:
    """A fixed selection: `per_task` prompts of each task from one of `SPLITS`, the same on every machine.

    Settings are chosen on `validation`; numbers are reported on `test`. Both are half seen, half held-out pairs where a task has both;
    a task with fewer prompts gives what it has.

    Raises:
        UserError: an unknown split or task, or a task that needs a larger canvas.
    """
    if split not in SPLITS:
        raise UserError(f"shapes has the splits {', '.join(SPLITS)}, not {split!r}")
    chosen = []
    for tag in tasks:
        if tag not in GENEVAL_TASKS + EXTRA_TASKS:
            raise UserError(f"shapes has no task {tag!r}; choose from {', '.join(GENEVAL_TASKS + EXTRA_TASKS)}")
        if tag in ("texture", "size") and size == 32:
            raise UserError(f"the task {tag} needs a canvas of 48 pixels or more (size=48)")
        pool = [prompt for prompt in enumerate_prompts(tag, size) if split_of(prompt) == split]
        pool.sort(key=lambda prompt: fraction(f"order|{prompt.text}"))
        unseen = [prompt for prompt in pool if held_out(prompt)][: per_task // 2]
        part = unseen + [prompt for prompt in pool if not held_out(prompt)][: per_task - len(unseen)]
        chosen += [
            Prompt(prompt.id, prompt.text, prompt.tag, {**prompt.meta, "split": split, "seen": not held_out(prompt)})
            for prompt in part
        ]
    return chosen


def wishes(prompt: Prompt) -> list[Wish]:
    """What a scene must hold to satisfy a prompt strictly: one wish per object, relations to earlier wishes."""
    wanted, first = [], []
    for clause in prompt.meta["include"]:
        relation = clause.get("position")
        first.append(len(wanted))
        wish = Wish(
            clause["class"],
            clause.get("color"),
            clause.get("texture"),
            clause.get("size"),
            (relation[0], first[relation[1]]) if relation else None,
        )
        wanted += [wish] * clause["count"]
    return wanted
