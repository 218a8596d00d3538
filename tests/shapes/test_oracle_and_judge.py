"""The oracle reads clean renders without error; the judge against GenEval's truth table and a
brute-force strict rule."""

import itertools

import numpy as np
import pytest

from t2i_rl.core.contracts import Defect
from t2i_rl.core.errors import UserError
from t2i_rl.core.geneval_rule import relations
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import ShapeDetection, components, detect
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import BASE_SHAPES, Object, Scene, sample_scene
from t2i_rl.shapes.suites import wishes
from t2i_rl.shapes.text import GENEVAL_TASKS, enumerate_prompts


def drawn(tag: str, count: int, size: int = 32, seed: int = 0):
    rng = np.random.default_rng(seed)
    pool = list(enumerate_prompts(tag, size))
    prompts = [pool[i] for i in rng.integers(0, len(pool), count)]
    scenes = [sample_scene(wishes(prompt), rng, size) for prompt in prompts]
    return prompts, scenes, np.stack([render(scene) for scene in scenes])


def box(shape, x, y, color="red", score=1.0, r=5.0, **extra):
    return ShapeDetection(shape, (x - r, y - r, x + r, y + r), score, color, **extra)


@pytest.mark.parametrize("size", [32, 48])
def test_clean_renders_are_read_back_exactly(size):
    for tag in GENEVAL_TASKS:
        prompts, scenes, images = drawn(tag, 200, size)
        for prompt, scene, detections in zip(prompts, scenes, detect(images), strict=True):
            verdict = judge(prompt.meta, detections)
            assert verdict.strict and verdict.lenient and verdict.score == 1 and not verdict.defects
            assert sorted((d.shape, d.color) for d in detections) == sorted((o.shape, o.color) for o in scene.objects)
            for item in scene.objects:
                assert min(np.hypot(d.center[0] - item.x, d.center[1] - item.y) for d in detections) < 0.5


@pytest.mark.parametrize(
    ("tag", "size"), [("texture", 48), ("size", 48), ("texture", 64), ("size", 64), ("complex", 32), ("negation", 32)]
)
def test_the_further_tasks_are_judged_exactly_too(tag, size):
    prompts, _, images = drawn(tag, 60, size)
    assert all(
        judge(prompt.meta, detections).strict for prompt, detections in zip(prompts, detect(images), strict=True)
    )


def test_it_is_deterministic_and_batches_change_nothing():
    _, _, images = drawn("counting", 12)
    together = detect(images)
    assert together == detect(images) == [detect(image[None])[0] for image in images]


def test_noise_and_a_crowded_canvas_fool_only_the_lenient_rule():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    items = [
        Object(shape, color, x, y, 4.5)
        for shape, color, x, y in zip(
            BASE_SHAPES, ("red", "blue", "green", "black"), (7, 24, 7, 24), (7, 7, 24, 24), strict=True
        )
    ]
    crowded = np.stack([render(Scene(tuple(items)))] * 60)
    for tag in GENEVAL_TASKS:
        prompts, _, _ = drawn(tag, 60, seed=3)
        for images in (noise, crowded):
            assert not any(
                judge(prompt.meta, detections).strict
                for prompt, detections in zip(prompts, detect(images), strict=True)
            )
    single, _, _ = drawn("single_object", 60)
    assert all(
        judge(prompt.meta, detections).lenient for prompt, detections in zip(single, detect(crowded), strict=True)
    )


def test_light_gaussian_noise_is_survived():
    prompts, _, images = drawn("color_attr", 200)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 8, images.shape), 0, 255).astype(np.uint8)
    assert (
        np.mean(
            [judge(prompt.meta, detections).strict for prompt, detections in zip(prompts, detect(noisy), strict=True)]
        )
        > 0.97
    )


def test_components_against_a_flood_fill():
    masks = np.random.default_rng(0).random((5, 16, 16)) < 0.4
    labels = components(masks)
    for mask, ours in zip(masks, labels, strict=True):
        labelled, groups = set(), []
        for start in map(tuple, np.argwhere(mask)):
            if start in labelled:
                continue
            stack, group = [start], set()
            while stack:
                y, x = stack.pop()
                if (y, x) in group or not (0 <= y < 16 and 0 <= x < 16) or not mask[y, x]:
                    continue
                group.add((y, x))
                stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            labelled |= group
            groups.append(group)
        assert {frozenset(map(tuple, np.argwhere(ours == value))) for value in np.unique(ours[ours > 0])} == {
            frozenset(g) for g in groups
        }


def test_other_sizes_are_refused():
    with pytest.raises(UserError, match="32 or 48 or 64"):
        detect(np.zeros((1, 40, 40, 3), dtype=np.uint8))


def test_a_blob_that_is_no_shape_is_malformed():
    image = np.full((32, 32, 3), 240, dtype=np.uint8)
    image[4:7, 4:25] = (215, 30, 35)
    image[20:28, 4:8] = (35, 70, 225)
    assert all(item.malformed for item in detect(image[None])[0])
    assert judge({"include": [{"class": "square", "count": 1}]}, detect(image[None])[0]).defects[0].kind == "missing"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((5, 16), (25, 16), {"left of"}),
        ((25, 16), (5, 16), {"right of"}),
        ((16, 5), (16, 25), {"above"}),
        ((16, 25), (16, 5), {"below"}),
        ((5, 5), (25, 25), {"left of", "above"}),
        ((16, 16), (16.5, 16.5), set()),
    ],
)
def test_relations_by_hand(a, b, expected):
    assert relations(box("circle", *a), box("square", *b)) == expected


def test_genevals_truth_table():
    def lenient(meta, *detections):
        return judge(meta, list(detections)).lenient

    two = {"include": [{"class": "circle", "count": 1}, {"class": "cross", "count": 1}]}
    assert lenient(two, box("circle", 5, 5), box("cross", 20, 20)) and not lenient(two, box("circle", 5, 5))
    colored = {"include": [{"class": "circle", "count": 1, "color": "red"}]}
    best_is_blue = [box("circle", 5, 5, "blue", 0.9), box("circle", 20, 20, "red", 0.8)]
    assert not lenient(colored, *best_is_blue) and lenient(
        colored, *[box("circle", 20, 20, "red", 0.95), *best_is_blue]
    )
    three = {"include": [{"class": "circle", "count": 3}], "exclude": [{"class": "circle", "count": 4}]}
    circles = [box("circle", x, 5) for x in (5, 12, 19, 26)]
    assert lenient(three, *circles[:3]) and not lenient(three, *circles) and not lenient(three, *circles[:2])
    placed = {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}]}
    assert lenient(placed, box("square", 25, 16), box("circle", 5, 16)) and not lenient(
        placed, box("square", 5, 16), box("circle", 25, 16)
    )
    wrong_reference = {
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ]
    }
    assert not lenient(wrong_reference, box("square", 25, 16, "red"), box("circle", 5, 16))


def brute_force_strict(meta, detections) -> bool:
    """Every assignment of the objects to what is asked, written out without the judge's slots."""
    asked = [(index, clause) for index, clause in enumerate(meta["include"]) for _ in range(clause["count"])]
    if len(asked) != len(detections) or any(item.malformed for item in detections):
        return False
    for order in itertools.permutations(detections):
        fits = True
        for (_, clause), item in zip(asked, order, strict=True):
            fits &= item.shape == clause["class"] and clause.get("color", item.color) == item.color
            if "position" in clause:
                relation, target = clause["position"]
                reference = next(other for (index, _), other in zip(asked, order, strict=True) if index == target)
                fits &= relation in relations(item, reference)
        if fits:
            return True
    return False


def test_strict_is_the_brute_force_rule_and_score_one_says_the_same():
    rng = np.random.default_rng(4)
    agreements = []
    for tag in GENEVAL_TASKS:
        prompts, scenes, _ = drawn(tag, 60, seed=8)
        for prompt, scene in zip(prompts, scenes, strict=True):
            detections = [box(o.shape, o.x, o.y, o.color, r=o.r) for o in scene.objects]
            change = rng.integers(4)
            if change == 1:
                detections = detections[:-1]
            elif change == 2:
                detections.append(box("circle", 30, 30, "cyan", malformed=bool(rng.integers(2))))
            elif change == 3:
                first = detections[0]
                detections[0] = ShapeDetection(
                    BASE_SHAPES[rng.integers(4)],
                    first.box[2:] + first.box[:2] if rng.integers(2) else first.box,
                    1.0,
                    first.color,
                )
            verdict = judge(prompt.meta, detections)
            assert (
                verdict.strict
                == brute_force_strict(prompt.meta, detections)
                == (verdict.score == 1)
                == (not verdict.defects)
            )
            agreements.append(verdict.strict)
    assert 0.2 < np.mean(agreements) < 0.8


def test_mending_a_defect_never_lowers_the_score():
    meta = {
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
        ]
    }
    ladder = [
        [],
        [box("square", 5, 16, "green")],
        [box("square", 5, 16, "blue")],
        [box("square", 5, 16, "blue"), box("circle", 25, 16, "green")],
        [box("square", 5, 16, "blue"), box("circle", 25, 16, "red")],
        [box("square", 25, 16, "blue"), box("circle", 5, 16, "red")],
    ]
    scores = [judge(meta, detections).score for detections in ladder]
    assert scores == sorted(set(scores)) and scores[0] == 0 and scores[-1] == 1
    perfect = ladder[-1]
    assert judge(meta, [*perfect, box("cross", 16, 28)]).score < 1


@pytest.mark.parametrize(
    ("detections", "word"),
    [
        ([], "missing: a red circle"),
        ([box("circle", 9, 9, "blue")], "wrong color: the circle is blue, not red"),
        ([box("square", 9, 9)], "wrong shape: square, not circle"),
        ([box("circle", 9, 9), box("cross", 20, 20, "black")], "extra: a black cross"),
        ([box("circle", 9, 9), box("cross", 20, 20, malformed=True)], "malformed: a red blob at (20, 20)"),
    ],
)
def test_defects_are_named(detections, word):
    defects = judge({"include": [{"class": "circle", "count": 1, "color": "red"}]}, detections).defects
    assert Defect(word.partition(":")[0], word) in defects


def test_the_wrong_side_is_named():
    meta = {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}]}
    assert judge(meta, [box("square", 5, 16), box("circle", 25, 16)]).defects == [
        Defect("wrong side", "wrong side: the circle is not left of the square")
    ]
