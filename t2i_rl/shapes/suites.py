"""Which prompts train, which choose settings and which test.

Object pairs are held out by a fixed hash, texts are disjoint, and all is pinned by sha256.
"""

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
    """A fixed pseudo-random number in [0, 1) for a string: the splits' one source of chance."""
    return int.from_bytes(hashlib.sha256(f"{SALT}|{text}".encode()).digest()[:8], "big") / 2**64


def object_pairs(prompt: Prompt) -> list[str]:
    """The unordered pairs of coloured objects that a prompt names (`red circle + blue square`)."""
    names = []
    for clause in prompt.meta["include"]:
        if "color" in clause:
            names += [f"{clause['color']} {clause['class']}"] * clause["count"]
    return sorted({" + ".join(sorted(pair)) for pair in itertools.combinations(names, 2)})


def pair_split(pair: str) -> str:
    """The split of an object pair: those of `test` and `validation` are in no training prompt."""
    percentile = 100 * fraction(f"pair|{pair}")
    if percentile < HELD_OUT_PERCENT["test"]:
        return "test"
    return "validation" if percentile < sum(HELD_OUT_PERCENT.values()) else "train"


def held_out(prompt: Prompt) -> bool:
    """Whether a prompt names a held-out pair of objects."""
    return any(pair_split(pair) != "train" for pair in object_pairs(prompt))


def split_of(prompt: Prompt) -> str:
    """The one split of a prompt: that of its held-out pairs, test before validation.

    Of all others a fixed share of the texts tests (a fifth, more in small tasks), and half as many
    validate.
    """
    pairs = {pair_split(pair) for pair in object_pairs(prompt)} - {"train"}
    if pairs:
        return min(pairs)
    percentile, test_percent = 100 * fraction(f"split|{prompt.text}"), TEST_PERCENT.get(prompt.tag, 20)
    if percentile < test_percent:
        return "test"
    return "validation" if percentile < 1.5 * test_percent else "train"


def train_prompts(tag: str, size: int = 32) -> list[Prompt]:
    """Every training prompt of a task."""
    return [prompt for prompt in enumerate_prompts(tag, size) if split_of(prompt) == "train"]


def select_prompts(split: str, per_task: int, tasks: tuple[str, ...] = GENEVAL_TASKS, size: int = 32) -> list[Prompt]:
    """A fixed selection: `per_task` prompts of each task from one of `SPLITS`.

    Settings are chosen on `validation`; numbers are reported on `test`. Both are half seen, half
    held-out pairs where a task has both; a task with fewer prompts gives what it has.

    Raises:
        UserError: an unknown split or task, or a task that needs a larger canvas.
    """
    if split not in SPLITS:
        raise UserError(f"shapes has the splits {', '.join(SPLITS)}, not {split!r}")
    selection = []
    for tag in tasks:
        if tag not in GENEVAL_TASKS + EXTRA_TASKS:
            raise UserError(f"shapes has no task {tag!r}; choose from {', '.join(GENEVAL_TASKS + EXTRA_TASKS)}")
        if tag in ("texture", "size") and size == 32:
            raise UserError(f"the task {tag} needs a canvas of 48 pixels or more (size=48)")
        pool = [prompt for prompt in enumerate_prompts(tag, size) if split_of(prompt) == split]
        pool.sort(key=lambda prompt: fraction(f"order|{prompt.text}"))
        unseen = [prompt for prompt in pool if held_out(prompt)][: per_task // 2]
        seen = [prompt for prompt in pool if not held_out(prompt)][: per_task - len(unseen)]
        for prompt in [*unseen, *seen]:
            meta = {**prompt.meta, "split": split, "seen": not held_out(prompt)}
            selection.append(Prompt(prompt.id, prompt.text, prompt.tag, meta))
    return selection


def wishes(prompt: Prompt) -> list[Wish]:
    """What a scene must hold to satisfy a prompt strictly: a wish for each object."""
    scene_wishes: list[Wish] = []
    first_wishes: list[int] = []  # of each clause
    for clause in prompt.meta["include"]:
        first_wishes.append(len(scene_wishes))
        color, texture, size_word, position = (clause.get(key) for key in ("color", "texture", "size", "position"))
        relation = (position[0], first_wishes[position[1]]) if position else None
        scene_wishes += [Wish(clause["class"], color, texture, size_word, relation)] * clause["count"]
    return scene_wishes
