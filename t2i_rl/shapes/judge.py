"""The judge of `shapes`: a pure function of detections and GenEval-form metadata; its lenient verdict is GenEval's own rule."""

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
        """Share of the asked attributes that an object has, its class among them; nothing for no object."""
        if item is None:
            return 0.0
        asked = [name for name in ATTRIBUTES if name in self.clause]
        hits = (item.shape == self.clause["class"]) + sum(getattr(item, name) == self.clause[name] for name in asked)
        return hits / (1 + len(asked))

    @property
    def name(self) -> str:
        words = [self.clause.get(key) for key in ("size", "texture", "color")]
        return " ".join([word for word in words if word] + [self.clause["class"]])


def slots(meta: dict) -> list[Slot]:
    """One slot for each object asked for."""
    asked, first = [], []
    for clause in meta["include"]:
        first.append(len(asked))
        relation = (clause["position"][0], first[clause["position"][1]]) if "position" in clause else None
        asked += [Slot(clause, relation)] * clause["count"]
    return asked


def judge(meta: dict, found: Sequence[ShapeDetection]) -> Verdict:
    """Verdict on one image.

    `score` = (credit of every slot + relations that hold) / (slots + relations + surplus objects), at the best matching of objects to slots;
    malformed blobs are surplus. Mending one defect never lowers it.
    """
    asked, match, extra, blobs = matching(meta, found)
    gained, possible = _credit(asked, match)
    score = gained / (possible + len(extra) + len(blobs))
    defects = _defects(asked, match, extra, blobs)
    whole = [item for item in found if not item.malformed]
    return Verdict(strict=not defects, lenient=lenient(meta, whole), score=score, defects=defects)


def matching(
    meta: dict, found: Sequence[ShapeDetection]
) -> tuple[list[Slot], tuple[ShapeDetection | None, ...], list[ShapeDetection], list[ShapeDetection]]:
    """What was asked for, the object that stands for each (or None), the objects that nobody asked for, and the malformed blobs."""
    asked = slots(meta)
    whole = sorted((item for item in found if not item.malformed), key=lambda item: -item.score)
    match = _best_matching(asked, whole[:MAX_MATCHED])
    taken = {id(item) for item in match if item is not None}
    extra = [item for item in whole if id(item) not in taken]
    return asked, match, extra, [item for item in found if item.malformed]


def _best_matching(asked: list[Slot], whole: list[ShapeDetection]) -> tuple[ShapeDetection | None, ...]:
    pool = whole + [None] * max(0, len(asked) - len(whole))
    return max(itertools.permutations(pool, len(asked)), key=lambda match: _credit(asked, match)[0])


def _credit(asked: list[Slot], match: Sequence[ShapeDetection | None]) -> tuple[float, int]:
    gained = sum(slot.credit(item) for slot, item in zip(asked, match, strict=True))
    related = [
        (item, slot.relation, match[slot.relation[1]]) for slot, item in zip(asked, match, strict=True) if slot.relation
    ]
    gained += sum(a is not None and b is not None and relation[0] in relations(a, b) for a, relation, b in related)
    return gained, len(asked) + len(related)


def _defects(asked, match, extra, blobs) -> list[Defect]:
    defects = []
    for slot, item in zip(asked, match, strict=True):
        if item is None or slot.credit(item) == 0:
            defects.append(Defect("missing", f"missing: {article(slot.name)}"))
            extra = extra + [item] * (item is not None)
            continue
        if item.shape != slot.clause["class"]:
            defects.append(Defect("wrong shape", f"wrong shape: {item.shape}, not {slot.clause['class']}"))
        for name in ATTRIBUTES:
            if name in slot.clause and getattr(item, name) != slot.clause[name]:
                is_now = getattr(item, name) or "of usual size"
                defects.append(
                    Defect(f"wrong {name}", f"wrong {name}: the {item.shape} is {is_now}, not {slot.clause[name]}")
                )
        if slot.relation:
            relation, target = slot.relation
            if match[target] is not None and relation not in relations(item, match[target]):
                text = f"wrong side: the {slot.name} is not {relation} the {asked[target].name}"
                defects.append(Defect("wrong side", text))
    defects += [Defect("extra", f"extra: {article(f'{item.color} {item.shape}')}") for item in extra]
    for item in blobs:
        x, y = item.center
        defects.append(Defect("malformed", f"malformed: a {item.color} blob at ({x:.0f}, {y:.0f})"))
    return defects
