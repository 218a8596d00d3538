"""What is wrong with a picture of the world, in its words, and the scene that mends it and keeps what was right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t2i_rl.core.geneval_rule import ATTRIBUTES, relations
from t2i_rl.core.prompts import Prompt
from t2i_rl.shapes.judge import Slot, matching
from t2i_rl.shapes.oracle import ShapeDetection
from t2i_rl.shapes.scene import COLORS, Object, Scene, Wish, apart, place, radii, relation_holds
from t2i_rl.shapes.text import NUMBERS, article, object_name, place_name, plan

NO_CHANGE = "stop."  # words of the tokenizer: `the stop signal` is one of the world's facts
TRIES = 40


@dataclass(frozen=True)
class Reflection:
    """`text`: what the picture shows, as a plan has it; each fault and how to mend it; the plan of the mended scene. Where nothing is wrong, `NO_CHANGE` in place
    of faults and plan. `faults`: what is wrong, a phrase each, as `text` begins its sentences. `kept`: the objects of `scene` that stand where the picture has them."""

    text: str
    faults: tuple[str, ...]
    scene: Scene
    kept: tuple[Object, ...]


def reflect(prompt: Prompt, found: Sequence[ShapeDetection], size: int, rng: np.random.Generator) -> Reflection:
    """Of what the oracle found in a picture of `size` pixels that was drawn for a prompt of the world."""
    asked, match, extra, blobs = matching(prompt.meta, found)
    seen = [None if item is None else as_object(item, size) for item in match]
    wrong = [_wrong(number, asked, match) for number in range(len(asked))]
    objects, stays = _mended(asked, seen, wrong, size, rng)
    scene = Scene(tuple(objects), size)
    faults, sentences = [], []
    for slot, item, fault, new in zip(asked, seen, wrong, objects, strict=True):
        if fault is None:
            continue
        told = f"no {slot.name}" if fault == "missing" else _at(item, size)
        remedy = {"missing": f"draw {_at(new, size)}", "place": f"draw at the {place_name(new, size)}"}
        faults.append(told)
        sentences.append(f"{told}: {remedy.get(fault, f'draw {article(object_name(new, size))}')}.")
    unused = [item for item, fault in zip(seen, wrong, strict=True) if item is not None and fault == "missing"]
    for item in [*unused, *(as_object(item, size) for item in extra)]:
        faults.append(_at(item, size))
        sentences.append(f"{faults[-1]}: clear.")
    for item in blobs:
        faults.append(_blob(item, size))
        sentences.append(f"{faults[-1]}: clear.")
    rest = [*sentences, plan(scene)] if faults else [NO_CHANGE]
    text = " ".join([*_shown(found, size), *rest])
    return Reflection(text, tuple(faults), scene, tuple(new for new, stay in zip(objects, stays, strict=True) if stay))


def _shown(found: Sequence[ShapeDetection], size: int) -> list[str]:
    """Sentences on what a picture shows, in reading order: how many objects, then each; a malformed one is an `object` of its colour."""
    items = sorted(((as_object(item, size), item) for item in found), key=lambda pair: (pair[0].y, pair[0].x))
    count = {0: "no objects.", 1: "one object."}.get(len(items)) or f"{NUMBERS.get(len(items), 'many')} objects."
    return [count, *(f"{_blob(item, size) if item.malformed else _at(seen, size)}." for seen, item in items)]


def named(text: str) -> tuple[str, ...]:
    """The faults that a written reflection names: what stands before the colon of each of its sentences."""
    return tuple(sentence.split(":")[0].strip() for sentence in text.split(".") if ":" in sentence)


def as_object(item: ShapeDetection, size: int) -> Object:
    """A detection on the grid of scenes: centre to half a pixel, radius the nearest that the canvas has."""
    half = max(item.box[2] - item.box[0], item.box[3] - item.box[1]) / 2
    r = min(radii(size, item.size), key=lambda value: abs(value - half))
    x, y = (min(max(round(2 * value) / 2, r + 1), size - r - 1) for value in item.center)
    return Object(item.shape, item.color, x, y, r, item.texture)


def _at(item: Object, size: int) -> str:
    return f"{article(object_name(item, size))} at the {place_name(item, size)}"


def _blob(item: ShapeDetection, size: int) -> str:
    return f"{article(f'{item.color} object')} at the {place_name(as_object(item, size), size)}"


def _wrong(number: int, asked: list[Slot], match: Sequence[ShapeDetection | None]) -> str | None:
    """What is wrong with the object that stands for a slot: `missing`, `looks`, `place`, or None."""
    slot, item = asked[number], match[number]
    if item is None or slot.credit(item) == 0:
        return "missing"
    if slot.credit(item) < 1:
        return "looks"
    if slot.relation:
        relation, target = slot.relation
        if match[target] is not None and relation not in relations(item, match[target]):
            return "place"
    return None


def _mended(
    asked: list[Slot], seen: list[Object | None], wrong: list[str | None], size: int, rng: np.random.Generator
) -> tuple[list[Object], list[bool]]:
    """An object for each slot, in place where it can stay, and which of them stay just as they are; after `TRIES` layouts that do not fit all are placed anew."""
    attempt = 0
    while True:
        objects: list[Object] = []
        stays = []
        for number, (slot, item, fault) in enumerate(zip(asked, seen, wrong, strict=True)):
            wish = _wish(slot, item if fault != "missing" else None, rng)
            there = None if item is None or fault in ("missing", "place") or attempt >= TRIES else _redrawn(item, wish)
            if there is None or not _fits(there, wish, objects):
                right = [
                    later for later, why in zip(seen[number + 1 :], wrong[number + 1 :], strict=True) if why is None
                ]
                there = place(wish, [*objects, *right] if attempt < TRIES else objects, rng, size)
            if there is None:
                break
            objects.append(there)
            stays.append(fault is None and there == item)
        if len(objects) == len(asked):
            return objects, stays
        attempt += 1


def _wish(slot: Slot, item: Object | None, rng: np.random.Generator) -> Wish:
    """The slot as a wish; what it leaves free is as the picture has it."""
    asked = {name: slot.clause.get(name) for name in ATTRIBUTES}
    color = asked["color"] or (item.color if item else str(rng.choice(tuple(COLORS))))
    texture = asked["texture"] or (item.texture if item else None)
    return Wish(slot.clause["class"], color, texture, asked["size"], slot.relation)


def _redrawn(item: Object, wish: Wish) -> Object:
    return Object(wish.shape, wish.color, item.x, item.y, item.r, wish.texture or "solid")


def _fits(item: Object, wish: Wish, placed: list[Object]) -> bool:
    clear = all(apart(item, other) for other in placed)
    return clear and (wish.relation is None or relation_holds(wish.relation[0], item, placed[wish.relation[1]]))
