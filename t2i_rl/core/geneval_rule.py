"""GenEval's rule (arXiv 2310.11513): whether detections hold what a prompt's metadata asks for.

It stands here since the judge of `shapes`, below every benchmark, follows it too. A detector for
GenEval itself has to bring what the official scorer does before its verdict: detections with a
score above 0.3 (above 0.9 for prompts tagged `counting`, of every class and of `exclude` too), best
first, at most 16 of a class, none suppressed for overlapping another; and a colour, where a clause
names one, by CLIP ViT-L/14 zero-shot over ten colours on the masked crop.
"""

from collections.abc import Sequence

import numpy as np

from t2i_rl.core.contracts import Detection

ATTRIBUTES = ("color", "texture", "size")


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` lies, seen from `b`: of `left of`, `right of`, `above`, `below`, those that hold.

    GenEval takes the offset of the centres, shrinks it by a tenth of both sizes, divides by its
    length before, and asks for more than 0.5 along a direction.
    """
    offset = np.subtract(a.center, b.center)
    extent = np.array([a.box[2] - a.box[0] + b.box[2] - b.box[0], a.box[3] - a.box[1] + b.box[3] - b.box[1]])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * extent, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    directions = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in directions.items() if holds}


def lenient(meta: dict, detections: Sequence[Detection]) -> bool:
    """GenEval's verdict on what was detected.

    Each clause takes the `count` best objects of its class, and asks for their attributes and
    places. Then `exclude` must name nothing that is there.
    """
    matched: list[list[Detection] | None] = []
    passed = True
    for clause in meta["include"]:
        of_class = [item for item in detections if item.label == clause["class"]]
        best = sorted(of_class, key=lambda item: -item.score)[: clause["count"]]
        fits = len(best) == clause["count"] and all(_has(item, clause) for item in best)
        if fits and "position" in clause:
            relation, target = clause["position"]
            reference = matched[target]
            fits = reference is not None and all(relation in relations(a, b) for a in best for b in reference)
        matched.append(best if fits else None)
        passed &= fits
    for clause in meta.get("exclude", ()):
        passed &= sum(item.label == clause["class"] for item in detections) < clause["count"]
    return passed


def _has(item: Detection, clause: dict) -> bool:
    return all(getattr(item, name) == clause[name] for name in ATTRIBUTES if name in clause)
