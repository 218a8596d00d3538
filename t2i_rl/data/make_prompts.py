"""Training prompts in GenEval's and T2I-CompBench's manner, annotated with the objects, counts, colours and relations that they ask for.

Wording: GenEval (arXiv 2310.11513) for `a photo of ...`, T2I-CompBench (arXiv 2307.06350) for attributes; rows: T2I-R1's format.
"""

import random
from collections.abc import Callable

from t2i_rl.data.words import COLORS, MORE_OBJECTS, NUMBERS, OBJECTS, SHAPES, TEXTURES, plural, with_article
from t2i_rl.errors import UserError
from t2i_rl.seeding import derive_seed

EVERYTHING = (*OBJECTS, *MORE_OBJECTS)
SIDES = ("left of", "right of", "above", "below")
COUNTABLE = tuple(noun for noun in EVERYTHING if plural(noun) != noun)
COLORABLE = tuple(noun for noun in EVERYTHING if noun not in ("person", "orange"))
TRIES = 200  # draws without a new prompt before a kind counts as used up


def _one(draw: random.Random) -> dict:
    noun = draw.choice(EVERYTHING)
    return {
        "prompt": f"a photo of {with_article(noun)}",
        "task_type": "object",
        "nouns": [noun],
        "include": [_clause(noun)],
    }


def _two(draw: random.Random) -> dict:
    nouns = draw.sample(EVERYTHING, 2)
    text = " and ".join(map(with_article, nouns))
    return {
        "prompt": f"a photo of {text}",
        "task_type": "object",
        "nouns": nouns,
        "include": [_clause(noun) for noun in nouns],
    }


def _counting(draw: random.Random) -> dict:
    noun, number = draw.choice(COUNTABLE), draw.choice(list(NUMBERS))
    counted = [{"obj_name": noun, "num": number}]
    return {
        "prompt": f"a photo of {NUMBERS[number]} {plural(noun)}", "task_type": "numeracy", "nouns": [noun], "numeracy_info": counted,
        "include": [_clause(noun, number)], "exclude": [_clause(noun, number + 1)],
    }  # fmt: skip


def _color(draw: random.Random) -> dict:
    noun, color = draw.choice(COLORABLE), draw.choice(COLORS)
    return {
        "prompt": f"a photo of {with_article(f'{color} {noun}')}", "task_type": "color", "nouns": [noun],
        "attr_nouns": [f"{color} {noun}"], "include": [{**_clause(noun), "color": color}],
    }  # fmt: skip


def _position(draw: random.Random) -> dict:
    (first, second), side = draw.sample(EVERYTHING, 2), draw.choice(SIDES)
    return {
        "prompt": f"a photo of {with_article(first)} {side} {with_article(second)}", "task_type": "spatial", "nouns": [first, second],
        "spatial_info": {"obj1": first, "obj2": second, "locality": side},
        "include": [_clause(second), {**_clause(first), "position": [side, 0]}],
    }  # fmt: skip


def _color_pair(draw: random.Random) -> dict:
    nouns, colors = draw.sample(COLORABLE, 2), draw.sample(COLORS, 2)
    row = _attributes("color", nouns, colors, "a photo of ")
    return row | {"include": [{**_clause(noun), "color": color} for noun, color in zip(nouns, colors)]}


def _texture(draw: random.Random) -> dict:
    return _attributes("texture", draw.sample(COLORABLE, 2), draw.sample(TEXTURES, 2))


def _shape(draw: random.Random) -> dict:
    return _attributes("shape", draw.sample(COLORABLE, 2), draw.sample(SHAPES, 2))


def _attributes(kind: str, nouns: list[str], attributes: list[str], opening: str = "") -> dict:
    phrases = [f"{attribute} {noun}" for attribute, noun in zip(attributes, nouns)]
    text = opening + " and ".join(map(with_article, phrases))
    return {"prompt": text, "task_type": kind, "nouns": nouns, "attr_nouns": phrases}


def _clause(noun: str, count: int = 1) -> dict:
    return {"class": noun, "count": count}


KINDS: dict[str, Callable[[random.Random], dict]] = {
    "single_object": _one,
    "two_object": _two,
    "counting": _counting,
    "colors": _color,
    "position": _position,
    "color_attr": _color_pair,
    "texture": _texture,
    "shape": _shape,
}


def make_prompts(kinds: list[str], per_kind: int, seed: int, barred: frozenset[str] = frozenset()) -> list[dict]:
    """`per_kind` rows of each kind, all different, none in `barred`; a function of the arguments alone. `tag` names a row's kind.

    Raises:
        UserError: an unknown kind, or one that has fewer prompts than asked for.
    """
    if type(per_kind) is not int or per_kind < 1:
        raise UserError(f"task.per_kind must be a whole number of 1 or more, not {per_kind!r}")
    rows = []
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"task.kinds holds {kind!r}; choose from {', '.join(KINDS)}")
        draw, seen, failed = random.Random(derive_seed(seed, "prompts", kind)), set(), 0
        while len(seen) < per_kind:
            row = KINDS[kind](draw)
            if row["prompt"] in seen or row["prompt"] in barred:
                failed += 1
                if failed > TRIES:
                    raise UserError(
                        f"task.per_kind={per_kind}: {kind} has little more than {len(seen)} different prompts; ask for fewer"
                    )
                continue
            failed = 0
            seen.add(row["prompt"])
            rows.append({"tag": kind, **row})
    return rows
