"""What is wrong with an image of the world, in its words, and the scene that mends it.

The mended scene keeps what was right.
"""

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
    """What is said of an image, and the scene that mends it.

    text: what the image shows, as a plan has it; each fault and how to mend it; the plan of the
    mended scene. Where nothing is wrong, `NO_CHANGE` stands in place of faults and plan. faults:
    what is wrong, a phrase each, as `text` begins its sentences. unmoved: the objects of `scene`
    that stand where the image has them.
    """

    text: str
    faults: tuple[str, ...]
    scene: Scene
    unmoved: tuple[Object, ...]


def reflect(prompt: Prompt, detections: Sequence[ShapeDetection], size: int, rng: np.random.Generator) -> Reflection:
    """The reflection on what the oracle detected in an image of `size` pixels."""
    slots, match, extra, blobs = matching(prompt.meta, detections)
    items = [None if item is None else as_object(item, size) for item in match]
    slot_faults = [_fault(number, slots, match) for number in range(len(slots))]
    objects, stays = _mended(slots, items, slot_faults, size, rng)
    scene = Scene(tuple(objects), size)
    faults, sentences = [], []
    for slot, item, fault, new in zip(slots, items, slot_faults, objects, strict=True):
        if fault is None:
            continue
        phrase = f"no {slot.name}" if fault == "missing" else _at(item, size)
        remedy = {"missing": f"draw {_at(new, size)}", "place": f"draw at the {place_name(new, size)}"}
        faults.append(phrase)
        sentences.append(f"{phrase}: {remedy.get(fault, f'draw {article(object_name(new, size))}')}.")
    unused = [item for item, fault in zip(items, slot_faults, strict=True) if item is not None and fault == "missing"]
    for item in [*unused, *(as_object(item, size) for item in extra)]:
        faults.append(_at(item, size))
        sentences.append(f"{faults[-1]}: clear.")
    for item in blobs:
        faults.append(_blob(item, size))
        sentences.append(f"{faults[-1]}: clear.")
    conclusion = [*sentences, plan(scene)] if faults else [NO_CHANGE]
    text = " ".join([*_description(detections, size), *conclusion])
    unmoved = tuple(new for new, stay in zip(objects, stays, strict=True) if stay)
    return Reflection(text, tuple(faults), scene, unmoved)


def _description(detections: Sequence[ShapeDetection], size: int) -> list[str]:
    """Sentences on what an image shows, in reading order: how many objects, then each of them.

    A malformed one is an `object` of its colour.
    """
    pairs = sorted(((as_object(item, size), item) for item in detections), key=lambda pair: (pair[0].y, pair[0].x))
    count = {0: "no objects.", 1: "one object."}.get(len(pairs)) or f"{NUMBERS.get(len(pairs), 'many')} objects."
    return [count, *(f"{_blob(item, size) if item.malformed else _at(on_grid, size)}." for on_grid, item in pairs)]


def named(text: str) -> tuple[str, ...]:
    """The faults that a reflection's text names: what stands before the colon of each sentence."""
    return tuple(sentence.split(":")[0].strip() for sentence in text.split(".") if ":" in sentence)


def as_object(item: ShapeDetection, size: int) -> Object:
    """A detection on the grid of scenes: centre to half a pixel, radius the canvas's nearest."""
    half = max(item.box[2] - item.box[0], item.box[3] - item.box[1]) / 2
    r = min(radii(size, item.size), key=lambda value: abs(value - half))
    x, y = (min(max(round(2 * value) / 2, r + 1), size - r - 1) for value in item.center)
    return Object(item.shape, item.color, x, y, r, item.texture)


def _at(item: Object, size: int) -> str:
    return f"{article(object_name(item, size))} at the {place_name(item, size)}"


def _blob(item: ShapeDetection, size: int) -> str:
    return f"{article(f'{item.color} object')} at the {place_name(as_object(item, size), size)}"


def _fault(number: int, slots: list[Slot], match: Sequence[ShapeDetection | None]) -> str | None:
    """What is wrong with a slot's object: `missing`, `looks`, `place`, or None."""
    slot, item = slots[number], match[number]
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
    slots: list[Slot], items: list[Object | None], faults: list[str | None], size: int, rng: np.random.Generator
) -> tuple[list[Object], list[bool]]:
    """An object for each slot, in place where it can stay, and which of them stay just as they are.

    After `TRIES` layouts that do not fit, all objects are placed anew.
    """
    attempt = 0
    while True:
        objects: list[Object] = []
        stays = []
        for number, (slot, item, fault) in enumerate(zip(slots, items, faults, strict=True)):
            wish = _wish(slot, item if fault != "missing" else None, rng)
            can_stay = item is not None and fault not in ("missing", "place") and attempt < TRIES
            new = _redrawn(item, wish) if can_stay else None
            if new is None or not _fits(new, wish, objects):
                later = zip(items[number + 1 :], faults[number + 1 :], strict=True)
                right_items = [right_item for right_item, its_fault in later if its_fault is None]
                new = place(wish, [*objects, *right_items] if attempt < TRIES else objects, rng, size)
            if new is None:
                break
            objects.append(new)
            stays.append(fault is None and new == item)
        if len(objects) == len(slots):
            return objects, stays
        attempt += 1


def _wish(slot: Slot, item: Object | None, rng: np.random.Generator) -> Wish:
    """The slot as a wish; what it leaves free is as the image has it."""
    color, texture, size_word = (slot.clause.get(name) for name in ATTRIBUTES)
    color = color or (item.color if item else str(rng.choice(tuple(COLORS))))
    texture = texture or (item.texture if item else None)
    return Wish(slot.clause["class"], color, texture, size_word, slot.relation)


def _redrawn(item: Object, wish: Wish) -> Object:
    return Object(wish.shape, wish.color, item.x, item.y, item.r, wish.texture or "solid")


def _fits(item: Object, wish: Wish, placed: list[Object]) -> bool:
    is_clear = all(apart(item, other) for other in placed)
    return is_clear and (wish.relation is None or relation_holds(wish.relation[0], item, placed[wish.relation[1]]))
