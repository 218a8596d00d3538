"""Training prompts after GenEval and T2I-CompBench, annotated with what they ask for.

Wording: GenEval (arXiv 2310.11513) for `a photo of ...`, T2I-CompBench (arXiv 2307.06350) for
attributes; rows: T2I-R1's format.
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


def _single_object(draw: random.Random) -> dict:
    noun = draw.choice(EVERYTHING)
    return {
        "prompt": f"a photo of {with_article(noun)}",
        "task_type": "object",
        "nouns": [noun],
        "include": [_clause(noun)],
    }


def _two_objects(draw: random.Random) -> dict:
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
    return {
        "prompt": f"a photo of {NUMBERS[number]} {plural(noun)}",
        "task_type": "numeracy",
        "nouns": [noun],
        "numeracy_info": [{"obj_name": noun, "num": number}],
        "include": [_clause(noun, number)],
        "exclude": [_clause(noun, number + 1)],
    }


def _color(draw: random.Random) -> dict:
    noun, color = draw.choice(COLORABLE), draw.choice(COLORS)
    return {
        "prompt": f"a photo of {with_article(f'{color} {noun}')}",
        "task_type": "color",
        "nouns": [noun],
        "attr_nouns": [f"{color} {noun}"],
        "include": [{**_clause(noun), "color": color}],
    }


def _position(draw: random.Random) -> dict:
    (first, second), side = draw.sample(EVERYTHING, 2), draw.choice(SIDES)
    return {
        "prompt": f"a photo of {with_article(first)} {side} {with_article(second)}",
        "task_type": "spatial",
        "nouns": [first, second],
        "spatial_info": {"obj1": first, "obj2": second, "locality": side},
        "include": [_clause(second), {**_clause(first), "position": [side, 0]}],
    }


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
    "single_object": _single_object,
    "two_object": _two_objects,
    "counting": _counting,
    "colors": _color,
    "position": _position,
    "color_attr": _color_pair,
    "texture": _texture,
    "shape": _shape,
}


def meaning(row: dict) -> tuple:
    """What a row asks for, however it is worded; its text where `include` does not say.

    These are objects with counts and colours, and which is left of or above which.
    """
    clauses = row.get("include")
    if not clauses or "attr_nouns" in row and not any("color" in clause for clause in clauses):
        return ("text", plain(row["prompt"]))
    objects = sorted((clause["class"], clause.get("count", 1), clause.get("color", "")) for clause in clauses)
    relations = []
    for clause in clauses:
        if "position" in clause:
            side, reference = clause["position"]
            pair = (clause["class"], clauses[reference]["class"])
            opposite = {"right of": "left of", "below": "above"}.get(side)
            relations.append((opposite, *pair[::-1]) if opposite else (side, *pair))
    return ("scene", tuple(objects), tuple(sorted(relations)))


def make_prompts(counts: dict[str, int], seed: int, barred: list[dict] | None = None) -> list[dict]:
    """Rows of each kind, as many as `counts` says; a function of the arguments alone.

    All differ in meaning from each other and from the `barred` rows. `tag` names a row's kind.

    Raises:
        UserError: an unknown kind, a number that is none, or more than a kind has.
    """
    used_meanings = {meaning for row in barred or () for meaning in _meanings(row)}
    rows = []
    for kind, count in counts.items():
        if kind not in KINDS:
            raise UserError(f"task.counts holds {kind!r}; choose from {', '.join(KINDS)}")
        if type(count) is not int or count < 0:
            raise UserError(f"task.counts.{kind} must be a whole number of 0 or more, not {count!r}")
        draw, rows_of_kind, failures = random.Random(derive_seed(seed, "prompts", kind)), 0, 0
        while rows_of_kind < count:
            row = KINDS[kind](draw)
            if _meanings(row) & used_meanings:
                failures += 1
                if failures > TRIES:
                    raise UserError(
                        f"task.counts.{kind}={count}: there are only {rows_of_kind} different prompts of this kind; "
                        "ask for fewer"
                    )
                continue
            used_meanings |= _meanings(row)
            rows.append({"tag": kind, **row})
            rows_of_kind, failures = rows_of_kind + 1, 0
    return rows


def _meanings(row: dict) -> set[tuple]:
    """What a row asks for, and its text: two rows may have neither in common."""
    return {meaning(row), ("text", plain(row["prompt"]))}
