"""Training prompts in GenEval's and T2I-CompBench's manner, annotated with the objects, counts, colours and relations that they ask for.

Wording: GenEval (arXiv 2310.11513) for `a photo of ...`, T2I-CompBench (arXiv 2307.06350) for attributes; rows: T2I-R1's format.
"""

import random
from collections.abc import Callable

from t2i_rl.core.errors import UserError
from t2i_rl.core.seeding import derive_seed
from t2i_rl.data.t2i_r1 import plain
from t2i_rl.data.words import COLORS, MORE_OBJECTS, NUMBERS, OBJECTS, SHAPES, TEXTURES, plural, with_article

EVERYTHING = (*OBJECTS, *MORE_OBJECTS)
SIDES = ("left of", "right of", "above", "below")
COUNTABLE = tuple(noun for noun in EVERYTHING if plural(noun) != noun)
COLORABLE = tuple(noun for noun in EVERYTHING if noun not in ("person", "orange"))
TRIES = 5000  # draws without a new prompt before a kind counts as used up


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


def meaning(row: dict) -> tuple:
    """What a row asks for, however it is worded: objects with counts and colours, and which is left of or above which. Its text where
    `include` does not say."""
    clauses = row.get("include")
    if not clauses or "attr_nouns" in row and not any("color" in clause for clause in clauses):
        return ("text", plain(row["prompt"]))
    things = sorted((clause["class"], clause.get("count", 1), clause.get("color", "")) for clause in clauses)
    relations = []
    for clause in clauses:
        if "position" in clause:
            side, other = clause["position"]
            pair = (clause["class"], clauses[other]["class"])
            opposite = {"right of": "left of", "below": "above"}.get(side)
            relations.append((opposite, *pair[::-1]) if opposite else (side, *pair))
    return ("scene", tuple(things), tuple(sorted(relations)))


def make_prompts(counts: dict[str, int], seed: int, barred: list[dict] | None = None) -> list[dict]:
    """So many rows of each kind, all different in meaning from each other and from the `barred` rows; a function of the arguments alone.
    `tag` names a row's kind.

    Raises:
        UserError: an unknown kind, a number that is none, or more than a kind has.
    """
    rows, taken = [], {meaning(row) for row in barred or []} | {("text", plain(row["prompt"])) for row in barred or []}
    for kind, wanted in counts.items():
        if kind not in KINDS:
            raise UserError(f"task.counts holds {kind!r}; choose from {', '.join(KINDS)}")
        if type(wanted) is not int or wanted < 0:
            raise UserError(f"task.counts.{kind} must be a whole number of 0 or more, not {wanted!r}")
        draw, made, failed = random.Random(derive_seed(seed, "prompts", kind)), 0, 0
        while made < wanted:
            row = KINDS[kind](draw)
            if {meaning(row), ("text", plain(row["prompt"]))} & taken:
                failed += 1
                if failed > TRIES:
                    raise UserError(f"task.counts.{kind}={wanted}: there are only {made} different prompts of this kind; ask for fewer")  # fmt: skip
                continue
            taken |= {meaning(row), ("text", plain(row["prompt"]))}
            rows.append({"tag": kind, **row})
            made, failed = made + 1, 0
    return rows
