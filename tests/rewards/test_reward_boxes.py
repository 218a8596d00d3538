"""The detection reward on planted boxes: every relation, counting, words, and where the released
scorer differs."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.rewards.boxes import (
    NEAR,
    SIDES,
    Detections,
    corners,
    detection_score,
    iou,
    nouns_of,
    position_score,
    suppress,
)

SIZE = (384, 384)
FILE = Path(__file__).parents[3] / "shared" / "data" / "t2i_r1" / "geneval_and_t2i_data_final.jsonl"
PLACES = {  # relation -> centres of the first and the second object
    "left of": ((0.2, 0.5), (0.8, 0.5)),
    "right of": ((0.8, 0.5), (0.2, 0.5)),
    "above": ((0.5, 0.2), (0.5, 0.8)),
    "below": ((0.5, 0.8), (0.5, 0.2)),
    "on the left of": ((0.2, 0.5), (0.8, 0.5)),
    "on the right of": ((0.8, 0.5), (0.2, 0.5)),
    "on top of": ((0.5, 0.2), (0.5, 0.8)),
    "on the top of": ((0.5, 0.2), (0.5, 0.8)),
    "on the bottom of": ((0.5, 0.8), (0.5, 0.2)),
    **{relation: ((0.4, 0.5), (0.6, 0.5)) for relation in NEAR},
}


def box(x: float, y: float, width: float = 0.1, height: float = 0.1) -> torch.Tensor:
    return torch.tensor([x, y, width, height])


def detections(*boxes: tuple[int, torch.Tensor]) -> Detections:
    """Planted detections `(noun, box)`, best first."""
    rows = [row for _, row in boxes]
    return Detections(
        torch.stack(rows) if rows else torch.zeros(0, 4),
        torch.linspace(0.9, 0.4, len(rows)),
        torch.tensor([noun for noun, _ in boxes], dtype=torch.long),
    )


def score(detections: Detections, meta: dict, compat: str = "paper") -> float:
    return detection_score(detections, meta, SIZE, 150.0, compat)


def position(first, second, relation, compat="paper", size=SIZE) -> float:
    return position_score(first, second, relation, size, 150.0, compat)


def test_overlap_is_counted_as_pixels_would_be():
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 12, (20, 2), generator=generator)
    boxes = torch.cat([low, low + torch.randint(1, 9, (20, 2), generator=generator)], dim=1)
    filled = [{(x, y) for x in range(a, c) for y in range(b, d)} for a, b, c, d in boxes.tolist()]
    expected = [[len(p & q) / len(p | q) for q in filled] for p in filled]
    torch.testing.assert_close(iou(boxes.double(), boxes.double()), torch.tensor(expected, dtype=torch.float64))
    remaining: list[int] = []
    for number in range(20):
        if all(expected[number][other] <= 0.3 for other in remaining):
            remaining.append(number)
    assert suppress(boxes.double(), 0.3).tolist() == remaining and 3 < len(remaining) < 20


def test_centres_become_corners():
    torch.testing.assert_close(corners(box(0.5, 0.4, 0.2, 0.4)[None]), torch.tensor([[0.4, 0.2, 0.6, 0.6]]))


@pytest.mark.parametrize("relation", sorted(SIDES))
def test_a_side_is_right_wrong_or_not_the_main_one(relation):
    first, second = (box(*centre) for centre in PLACES[relation])
    assert position(first, second, relation) == 1.0 and position(second, first, relation) == 0.0
    axis = SIDES[relation][0]
    aslant = first.clone()
    aslant[1 - axis] = second[1 - axis] + 0.61  # farther on the other axis
    assert position(aslant, second, relation) == 0.0


def test_overlapping_objects_score_a_tenth_over_their_overlap():
    first, second = box(0.4, 0.5, 0.4, 0.4), box(0.6, 0.5, 0.4, 0.4)
    assert position(first, second, "left of") == pytest.approx(0.1 / (1 / 3), rel=1e-5)


def test_near_is_in_pixels_and_falls_off():
    far, corner = box(0.9, 0.9), box(0.1, 0.1)
    assert position(box(0.4, 0.9), corner, "near") == 1.0  # 115 pixels across, whatever the height
    assert position(far, corner, "next to") == pytest.approx(150 / (0.8 * 384))
    assert position(far, corner, "next to", size=(1000, 500)) == pytest.approx(150 / 800)
    assert position(far, corner, "near", "released") == 1.0  # parts of an image against pixels: always near


def test_released_knows_neither_above_nor_on_top_of():
    for relation in ("above", "on top of"):
        first, second = (box(*centre) for centre in PLACES[relation])
        assert position(first, second, relation, "released") == 0.0
    first, second = (box(*centre) for centre in PLACES["on the top of"])
    assert position(first, second, "on the top of", "released") == 1.0


def test_a_relation_without_a_rule_is_refused():
    with pytest.raises(UserError, match="inside"):
        position(box(0.2, 0.5), box(0.8, 0.5), "inside")


@pytest.mark.parametrize(
    ("boxes", "paper", "released"),
    [
        (((0, box(0.2, 0.5)), (1, box(0.8, 0.5))), 1.0, 0.9),  # both, and right
        (((0, box(0.8, 0.5)), (1, box(0.2, 0.5))), 0.4, 0.4),  # both, wrong side
        (((0, box(0.2, 0.5)),), 0.2, 0.2),  # one
        ((), 0.0, 0.0),
        (((0, box(0.2, 0.5)), (0, box(0.9, 0.5)), (1, box(0.8, 0.5))), 1.0, 0.9),  # the best box of an object counts
    ],
)
def test_spatial_scores(boxes, paper, released):
    meta = {"nouns": ["car", "dog"], "spatial_info": {"obj1": "car", "obj2": "dog", "locality": "left of"}}
    assert score(detections(*boxes), meta) == pytest.approx(paper)
    assert score(detections(*boxes), meta, "released") == pytest.approx(released)


def test_counting_is_all_or_nothing_and_released_pays_for_any():
    meta = {"nouns": ["cup"], "numeracy_info": [{"obj_name": "cup", "num": 2}]}
    two = detections((0, box(0.2, 0.2)), (0, box(0.7, 0.7)))
    three = detections((0, box(0.2, 0.2)), (0, box(0.7, 0.7)), (0, box(0.7, 0.2)))
    assert score(two, meta) == 1.0 and score(three, meta) == 0.0 and score(detections(), meta) == 0.0
    assert score(three, meta, "released") in (0.2, 1.0) and score(detections(), meta, "released") == 0.0


def test_duplicates_of_one_object_are_counted_once_but_not_by_the_released_scorer():
    meta = {"nouns": ["cup"], "numeracy_info": [{"obj_name": "cup", "num": 2}]}
    doubled = detections((0, box(0.3, 0.3, 0.2, 0.2)), (0, box(0.31, 0.3, 0.2, 0.2)), (0, box(0.7, 0.7, 0.2, 0.2)))
    assert score(doubled, meta) == 1.0
    assert score(doubled, meta, "released") == 0.2  # centre and size read as corners


def test_counting_averages_over_what_is_counted():
    meta = {"nouns": ["cup", "dog"], "numeracy_info": [{"obj_name": "cup", "num": 1}, {"obj_name": "dog", "num": 2}]}
    assert score(detections((0, box(0.2, 0.2)), (1, box(0.7, 0.7))), meta) == 0.5


def test_the_same_noun_twice_needs_two_objects():
    meta = {"nouns": ["umbrella"], "spatial_info": {"obj1": "umbrella", "obj2": "umbrella", "locality": "above"}}
    high, low = box(0.5, 0.2, 0.2, 0.2), box(0.5, 0.8, 0.2, 0.2)
    assert score(detections((0, low), (0, high)), meta) == score(detections((0, high), (0, low)), meta) == 1.0
    assert score(detections((0, high)), meta) == pytest.approx(0.4)
    assert score(detections((0, high), (0, box(0.5, 0.25, 0.2, 0.2))), meta) == pytest.approx(
        0.4
    )  # one object, boxed twice
    assert (
        score(detections((0, high), (0, low)), meta, "released") == 0.0
    )  # it fails inside, and the failure counts as 0


def test_what_only_a_relation_names_is_looked_for_too():
    meta = {"nouns": ["watch"], "spatial_info": {"obj1": "watch", "obj2": "jewelry box", "locality": "next to"}}
    assert nouns_of(meta) == ["watch", "jewelry box"]
    assert score(detections((0, box(0.4, 0.5)), (1, box(0.6, 0.5))), meta) == 1.0


@pytest.mark.skipif(not FILE.exists(), reason="T2I-R1's file is not beside this checkout")
def test_a_perfect_picture_scores_one_on_every_row_of_t2i_r1():
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    kinds = Counter()
    for meta in rows:
        nouns, planted = nouns_of(meta), []
        if meta.get("numeracy_info"):
            for number, item in enumerate(meta["numeracy_info"]):
                noun = nouns.index(item["obj_name"])
                planted += [(noun, box(0.02 + 0.04 * k, 0.05 + 0.1 * number, 0.02, 0.02)) for k in range(item["num"])]
        elif meta.get("spatial_info"):
            info = meta["spatial_info"]
            centres = zip(("obj1", "obj2"), PLACES[info["locality"]])
            planted = [(nouns.index(info[key]), box(*centre)) for key, centre in centres]
            planted += [(number, box(0.9, 0.9)) for number in range(len(nouns))]
        else:
            planted = [(number, box(0.5, 0.5)) for number in range(len(nouns))]
        assert score(detections(*planted), meta) == pytest.approx(1.0), meta
        kinds[meta["task_type"]] += 1
    assert sum(kinds.values()) == 7223 and kinds["spatial"] == 2195 and kinds["numeracy"] == 1172
