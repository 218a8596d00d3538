"""The judge: a pure function of detections and GenEval-form metadata; its lenient verdict is GenEval's own rule.

Only `shapes` has a detector here. One for GenEval would have to bring what the official scorer does before its verdict:
detections with a score above 0.3 (above 0.9 for prompts tagged `counting`, of every class and of `exclude` too), best
first, at most 16 of a class, none suppressed for overlapping another; and a colour, where a clause names one, by CLIP
ViT-L/14 zero-shot over ten colours on the masked crop.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t2i_rl.shapes.oracle import Detection
from t2i_rl.shapes.text import article

ATTRIBUTES = ("color", "texture", "size")
MAX_MATCHED = 6


@dataclass(frozen=True)
class Verdict:
    """strict: exactly what was asked and nothing else. lenient: GenEval's own rule. score: partial credit in [0, 1], 1 only if strict.
    defects: what is wrong, in words; empty only if strict.
    """

    strict: bool
    lenient: bool
    score: float
    defects: list[str]


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies seen from `b` (GenEval): the centre offset, shrunk by a tenth of both sizes, over its length, beyond 0.5."""
    offset = np.subtract(a.center, b.center)
    extent = np.array([a.box[2] - a.box[0] + b.box[2] - b.box[0], a.box[3] - a.box[1] + b.box[3] - b.box[1]])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * extent, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in held.items() if holds}


def lenient(meta: dict, found: Sequence[Detection]) -> bool:
    """GenEval's verdict: for each clause the `count` best objects of its class, their colours, their places; then `exclude`."""
    matched: list[list[Detection] | None] = []
    passed = True
    for clause in meta["include"]:
        best = sorted((item for item in found if item.shape == clause["class"]), key=lambda item: -item.score)[
            : clause["count"]
        ]
        fits = len(best) == clause["count"] and all(_has(item, clause) for item in best)
        if fits and "position" in clause:
            relation, target = clause["position"]
            reference = matched[target]
            fits = reference is not None and all(relation in relations(a, b) for a in best for b in reference)
        matched.append(best if fits else None)
        passed &= fits
    for clause in meta.get("exclude", ()):
        passed &= sum(item.shape == clause["class"] for item in found) < clause["count"]
    return passed


def _has(item: Detection, clause: dict) -> bool:
    return all(getattr(item, name) == clause[name] for name in ATTRIBUTES if name in clause)


@dataclass(frozen=True)
class Slot:
    """One object that the prompt asks for; `relation` is to an earlier slot."""

    clause: dict
    relation: tuple[str, int] | None

    def credit(self, item: Detection | None) -> float:
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


def judge(meta: dict, found: Sequence[Detection]) -> Verdict:
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
    meta: dict, found: Sequence[Detection]
) -> tuple[list[Slot], tuple[Detection | None, ...], list[Detection], list[Detection]]:
    """What was asked for, the object that stands for each (or None), the objects that nobody asked for, and the malformed blobs."""
    asked = slots(meta)
    whole = sorted((item for item in found if not item.malformed), key=lambda item: -item.score)
    match = _best_matching(asked, whole[:MAX_MATCHED])
    taken = {id(item) for item in match if item is not None}
    extra = [item for item in whole if id(item) not in taken]
    return asked, match, extra, [item for item in found if item.malformed]


def _best_matching(asked: list[Slot], whole: list[Detection]) -> tuple[Detection | None, ...]:
    pool = whole + [None] * max(0, len(asked) - len(whole))
    return max(itertools.permutations(pool, len(asked)), key=lambda match: _credit(asked, match)[0])


def _credit(asked: list[Slot], match: Sequence[Detection | None]) -> tuple[float, int]:
    gained = sum(slot.credit(item) for slot, item in zip(asked, match, strict=True))
    related = [
        (item, slot.relation, match[slot.relation[1]]) for slot, item in zip(asked, match, strict=True) if slot.relation
    ]
    gained += sum(a is not None and b is not None and relation[0] in relations(a, b) for a, relation, b in related)
    return gained, len(asked) + len(related)


def _defects(asked, match, extra, blobs) -> list[str]:
    words = []
    for slot, item in zip(asked, match, strict=True):
        if item is None or slot.credit(item) == 0:
            words.append(f"missing: {article(slot.name)}")
            extra = extra + [item] * (item is not None)
            continue
        if item.shape != slot.clause["class"]:
            words.append(f"wrong shape: {item.shape}, not {slot.clause['class']}")
        for name in ATTRIBUTES:
            if name in slot.clause and getattr(item, name) != slot.clause[name]:
                words.append(
                    f"wrong {name}: the {item.shape} is {getattr(item, name) or 'of usual size'}, not {slot.clause[name]}"
                )
        if slot.relation:
            relation, target = slot.relation
            if match[target] is not None and relation not in relations(item, match[target]):
                words.append(f"wrong side: the {slot.name} is not {relation} the {asked[target].name}")
    words += [f"extra: {article(f'{item.color} {item.shape}')}" for item in extra]
    return words + [f"malformed: a {item.color} blob at ({item.center[0]:.0f}, {item.center[1]:.0f})" for item in blobs]
