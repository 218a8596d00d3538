"""The judge of `shapes`: a pure function of detections and metadata, strict and lenient."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from t2i_rl.core.contracts import Defect, Verdict
from t2i_rl.core.geneval_rule import ATTRIBUTES, lenient, relations
from t2i_rl.shapes.oracle import ShapeDetection
from t2i_rl.shapes.text import article

MAX_MATCHED = 6


@dataclass(frozen=True)
class Slot:
    """One object that the prompt asks for; `relation` is to an earlier slot."""

    clause: dict
    relation: tuple[str, int] | None

    def credit(self, item: ShapeDetection | None) -> float:
        """Share of the asked attributes, the class among them, that an object has."""
        if item is None:
            return 0.0
        attributes = [name for name in ATTRIBUTES if name in self.clause]
        right_attributes = sum(getattr(item, name) == self.clause[name] for name in attributes)
        return ((item.shape == self.clause["class"]) + right_attributes) / (1 + len(attributes))

    @property
    def name(self) -> str:
        words = [self.clause.get(key) for key in ("size", "texture", "color")]
        return " ".join([word for word in words if word] + [self.clause["class"]])


def slots(meta: dict) -> list[Slot]:
    """One slot for each object asked for."""
    prompt_slots: list[Slot] = []
    first_slots: list[int] = []  # of each clause
    for clause in meta["include"]:
        first_slots.append(len(prompt_slots))
        relation = (clause["position"][0], first_slots[clause["position"][1]]) if "position" in clause else None
        prompt_slots += [Slot(clause, relation)] * clause["count"]
    return prompt_slots


def judge(meta: dict, detections: Sequence[ShapeDetection]) -> Verdict:
    """Verdict on one image.

    `score` = (credit of every slot + relations that hold) / (slots + relations + surplus objects),
    at the best matching of objects to slots; malformed blobs are surplus. Mending one defect never
    lowers it.
    """
    prompt_slots, match, extra, blobs = matching(meta, detections)
    credit, possible_credit = _credit(prompt_slots, match)
    score = credit / (possible_credit + len(extra) + len(blobs))
    defects = _defects(prompt_slots, match, extra, blobs)
    objects = [item for item in detections if not item.malformed]
    return Verdict(strict=not defects, lenient=lenient(meta, objects), score=score, defects=defects)


def matching(
    meta: dict, detections: Sequence[ShapeDetection]
) -> tuple[list[Slot], tuple[ShapeDetection | None, ...], list[ShapeDetection], list[ShapeDetection]]:
    """Which detection stands for which object that was asked for.

    Returns the slots, the object that stands for each (or None), the objects that nobody asked for,
    and the malformed blobs.
    """
    prompt_slots = slots(meta)
    objects = sorted((item for item in detections if not item.malformed), key=lambda item: -item.score)
    match = _best_matching(prompt_slots, objects[:MAX_MATCHED])
    matched_ids = {id(item) for item in match if item is not None}
    extra = [item for item in objects if id(item) not in matched_ids]
    return prompt_slots, match, extra, [item for item in detections if item.malformed]


def _best_matching(prompt_slots: list[Slot], objects: list[ShapeDetection]) -> tuple[ShapeDetection | None, ...]:
    pool = objects + [None] * max(0, len(prompt_slots) - len(objects))
    return max(itertools.permutations(pool, len(prompt_slots)), key=lambda match: _credit(prompt_slots, match)[0])


def _credit(prompt_slots: list[Slot], match: Sequence[ShapeDetection | None]) -> tuple[float, int]:
    """The credit of a matching and the most that it could have: one a slot and one a relation."""
    pairs = list(zip(prompt_slots, match, strict=True))
    credit = sum(slot.credit(item) for slot, item in pairs)
    related = [(item, slot.relation[0], match[slot.relation[1]]) for slot, item in pairs if slot.relation]
    credit += sum(a is not None and b is not None and relation in relations(a, b) for a, relation, b in related)
    return credit, len(prompt_slots) + len(related)


def _defects(
    prompt_slots: list[Slot],
    match: Sequence[ShapeDetection | None],
    extra: list[ShapeDetection],
    blobs: list[ShapeDetection],
) -> list[Defect]:
    defects = []
    for slot, item in zip(prompt_slots, match, strict=True):
        if item is None or slot.credit(item) == 0:
            defects.append(Defect("missing", f"missing: {article(slot.name)}"))
            extra = extra + [item] * (item is not None)
            continue
        if item.shape != slot.clause["class"]:
            defects.append(Defect("wrong shape", f"wrong shape: {item.shape}, not {slot.clause['class']}"))
        for name in ATTRIBUTES:
            if name in slot.clause and getattr(item, name) != slot.clause[name]:
                value = getattr(item, name) or "of usual size"
                text = f"wrong {name}: the {item.shape} is {value}, not {slot.clause[name]}"
                defects.append(Defect(f"wrong {name}", text))
        if slot.relation:
            relation, target = slot.relation
            if match[target] is not None and relation not in relations(item, match[target]):
                text = f"wrong side: the {slot.name} is not {relation} the {prompt_slots[target].name}"
                defects.append(Defect("wrong side", text))
    defects += [Defect("extra", f"extra: {article(f'{item.color} {item.shape}')}") for item in extra]
    for item in blobs:
        x, y = item.center
        defects.append(Defect("malformed", f"malformed: a {item.color} blob at ({x:.0f}, {y:.0f})"))
    return defects
