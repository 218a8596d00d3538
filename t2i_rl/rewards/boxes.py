"""T2I-R1's detection reward, boxes in and a score out (arXiv 2505.00703 section 3.4)."""

from dataclasses import dataclass

import torch

from t2i_rl.core.errors import UserError

SIDES = {  # wording -> axis (0 x, 1 y) and the sign of (first centre - second centre)
    "left of": (0, -1),
    "on the left of": (0, -1),
    "right of": (0, 1),
    "on the right of": (0, 1),
    "above": (1, -1),
    "on top of": (1, -1),
    "on the top of": (1, -1),
    "below": (1, 1),
    "on the bottom of": (1, 1),
}
NEAR = ("near", "next to", "on side of")
COMPATS = ("paper", "released")


@dataclass
class Detections:
    """What a detector found in one image, best first.

    boxes: `(n, 4)`, as centre x, centre y, width, height in parts of the image. scores: `(n,)`.
    labels: `(n,)`, the index of the noun that each was found for.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor

    def of(self, noun: int) -> torch.Tensor:
        """Boxes of one noun, best first."""
        return self.boxes[self.labels == noun]


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """`(n, 4)` centre and size -> left, top, right, bottom."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union `(n, m)` of corner boxes `(n, 4)` and `(m, 4)`; 0 for empty ones."""
    least, greatest = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (greatest - least).clamp(min=0).prod(-1)
    areas = [(box[:, 2:] - box[:, :2]).prod(-1) for box in (a, b)]
    union = areas[0][:, None] + areas[1][None] - shared
    return torch.where(union != 0, shared / union.where(union != 0, torch.ones_like(union)), torch.zeros_like(union))


def suppress(boxes: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Non-maximum suppression of corner boxes `(n, 4)`, best first: the indices that stay."""
    overlaps, remaining = iou(boxes, boxes), []
    for number in range(len(boxes)):
        if all(overlaps[number, better] <= threshold for better in remaining):
            remaining.append(number)
    return torch.tensor(remaining, dtype=torch.long)


def position_score(
    first: torch.Tensor, second: torch.Tensor, relation: str, size: tuple[int, int], near_pixels: float, compat: str
) -> float:
    """How well box `first` stands to box `second` `(4,)` as `relation` says, in [0, 1].

    A side scores 1 if the first box lies on it, that axis dominates and the boxes overlap by an IoU
    below 0.1; it scores 0.1 / IoU if they overlap more. Near scores 1 if the centres are within
    `near_pixels` on either axis of an image of `size` (width, height), else `near_pixels` over the
    greater distance. `released` does not know `above` and `on top of`, and compares distances in
    parts of the image with pixels: near is always 1.

    Raises:
        UserError: a relation that the paper's scorer has no rule for.
    """
    away = first[:2] - second[:2]
    if relation in NEAR:
        distance = away.abs() if compat == "released" else away.abs() * torch.tensor(size).to(away)
        return 1.0 if bool((distance < near_pixels).any()) else near_pixels / float(distance.max())
    if relation not in SIDES:
        raise UserError(f"reward=gdino knows no rule for {relation!r}; it knows {', '.join([*SIDES, *NEAR])}")
    if compat == "released" and relation in ("above", "on top of"):
        return 0.0
    axis, sign = SIDES[relation]
    if sign * float(away[axis]) <= 0 or float(away[axis].abs()) <= float(away[1 - axis].abs()):
        return 0.0
    overlap = float(iou(corners(first[None]), corners(second[None])))
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def spatial_score(
    detections: Detections, nouns: list[str], info: dict, size: tuple[int, int], near_pixels: float, compat: str
) -> float:
    """How well two nouns stand to each other as `info` says.

    Paper: 0.6 times the position score (0 unless both are there) + 0.4 times the share of the nouns
    found. Released: 0.2 for each of the two found, and 0.5 times the position score if both are:
    0.9 at most.

    Where both are the same noun, its two best boxes stand for them, in the better order. The
    released scorer fails inside on such a pair and counts the failure as 0.
    """
    pair = [detections.of(nouns.index(info[key])) for key in ("obj1", "obj2")]
    if info["obj1"] == info["obj2"] and compat == "released":
        return 0.0
    if info["obj1"] == info["obj2"]:
        best = pair[0][suppress(corners(pair[0]))[:2]]
        orders = [(best[0], best[1]), (best[1], best[0])] if len(best) == 2 else []
    else:
        orders = [(pair[0][0], pair[1][0])] if all(map(len, pair)) else []
    scores = [position_score(*order, info["locality"], size, near_pixels, compat) for order in orders]
    position, present = max(scores, default=0.0), [len(boxes) > 0 for boxes in pair]
    if compat == "released":
        return 0.2 * sum(present) + 0.5 * position
    return 0.6 * position + 0.4 * detected_score(detections, nouns, nouns)


def counting_score(detections: Detections, nouns: list[str], info: list[dict], compat: str) -> float:
    """Share of what is to be counted of which as many boxes survive suppression as asked for.

    Boxes are suppressed at an IoU of 0.5. Released: a wrong count that is not 0 scores 0.2; and
    centre-and-size boxes are suppressed as if they were corners.
    """
    scores = []
    for item in info:
        boxes = detections.of(nouns.index(item["obj_name"]))
        count = len(suppress(boxes if compat == "released" else corners(boxes)))
        partial = 0.2 if compat == "released" and count else 0.0
        scores.append(1.0 if count == item["num"] else partial)
    return sum(scores) / len(scores)


def detected_score(detections: Detections, nouns: list[str], asked: list[str]) -> float:
    """Share of the `asked` nouns that were found; one counts as often as it stands there."""
    return sum(len(detections.of(nouns.index(noun))) > 0 for noun in asked) / len(asked)


def detection_score(
    detections: Detections, meta: dict, size: tuple[int, int], near_pixels: float, compat: str
) -> float:
    """How well detections fit a prompt, by the annotation that it has.

    It is the counting score where the prompt has `numeracy_info`, the spatial one where it has
    `spatial_info`, else the share of its `nouns` that were found. Released: the prompt's
    `task_type` decides instead, so that a `complex` prompt with a relation is scored by its nouns
    alone; a noun counts as often as it is named; and a prompt without nouns scores 1.

    Args:
        detections: its labels are indices into `nouns_of(meta)`.
    """
    nouns = nouns_of(meta)
    if compat == "released" and not meta["nouns"]:
        return 1.0
    kind = task_kind(meta) if compat == "released" else annotated_kind(meta)
    if kind == "numeracy":
        return counting_score(detections, nouns, meta["numeracy_info"], compat)
    if kind == "spatial":
        return spatial_score(detections, nouns, meta["spatial_info"], size, near_pixels, compat)
    return detected_score(detections, nouns, asked_nouns(meta, compat))


def annotated_kind(meta: dict) -> str:
    """`numeracy` or `spatial` by the annotation that a prompt has, else `object`."""
    return "numeracy" if meta.get("numeracy_info") else "spatial" if meta.get("spatial_info") else "object"


def task_kind(meta: dict) -> str:
    """A prompt's `task_type`, which T2I-R1's scorers go by, or that of its annotations."""
    return meta.get("task_type") or annotated_kind(meta)


def asked_nouns(meta: dict, compat: str) -> list[str]:
    """What the detector is asked for: each of `nouns_of` once.

    Released: the prompt's `nouns` alone, as often as they stand there.
    """
    return list(meta["nouns"]) if compat == "released" else nouns_of(meta)


def nouns_of(meta: dict) -> list[str]:
    """What is to be found: the prompt's `nouns`, and what its relations and counts name."""
    nouns = [*meta["nouns"], *(item["obj_name"] for item in meta.get("numeracy_info") or [])]
    nouns += [meta["spatial_info"][key] for key in ("obj1", "obj2")] if meta.get("spatial_info") else []
    return list(dict.fromkeys(nouns))
