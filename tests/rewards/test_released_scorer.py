"""T2I-R1's released detection scorer, written anew in plain Python from its description, against
`compat=released` on planted cases."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from t2i_rl.core.prompts import Prompt
from t2i_rl.rewards.gdino import GroundingDino
from t2i_rl.rewards.git_vqa import GitVQA
from t2i_rl.rewards.orm import ORM
from tests.support.commands import composed
from tests.support.small_rewards import save_small_gdino, save_small_orm

QUERIES, SIDE = 5, 32
SINGLE, DOUBLE, TRIPLE = ["car", "dog", "cat", "bench", "cup"], ["teddy bear", "traffic light"], ["computer mouse pad"]
RELATIONS = [
    "left of",
    "on the left of",
    "right of",
    "above",
    "on the top of",
    "on top of",
    "below",
    "on the bottom of",
    "near",
    "next to",
]
CASES = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_small_gdino(tmp_path_factory.mktemp("gdino"))


class Planted:
    """A detector whose answer was decided beforehand: `probabilities` `(queries, tokens)` and
    `boxes` `(queries, 4)` for one picture."""

    device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(max_text_len=256)

    def __init__(self, probabilities: np.ndarray, boxes: np.ndarray):
        self.probabilities, self.boxes = torch.from_numpy(probabilities), torch.from_numpy(boxes)

    def __call__(self, input_ids, **inputs):
        logits = torch.logit(self.probabilities[None, :, : input_ids.shape[1]])
        return SimpleNamespace(logits=logits, pred_boxes=self.boxes[None])


def case(generator: np.random.Generator) -> tuple[dict, np.ndarray, np.ndarray]:
    """A random annotated prompt with what the detector sees for it."""
    kind = str(generator.choice(["object", "complex", "spatial", "numeracy"]))
    names = SINGLE + DOUBLE + TRIPLE if kind in ("object", "complex") else SINGLE + DOUBLE
    nouns = [str(noun) for noun in generator.choice(names, size=generator.integers(1, 4))]
    meta: dict = {"task_type": kind}
    if kind == "spatial" or (kind == "complex" and generator.random() < 0.5):
        nouns = [*nouns, str(generator.choice(names))]
        meta["spatial_info"] = {"obj1": nouns[0], "obj2": nouns[-1], "locality": str(generator.choice(RELATIONS))}
    if kind == "numeracy":
        meta["numeracy_info"] = [
            {"obj_name": noun, "num": int(generator.integers(1, 4))} for noun in dict.fromkeys(nouns)
        ]
    meta["nouns"] = nouns
    probabilities = generator.choice([0.05, 0.2, 0.29, 0.32, 0.45, 0.6, 0.9], size=(QUERIES, 40))
    probabilities = probabilities + generator.uniform(0, 0.004, probabilities.shape)
    sizes = generator.uniform(0.05, 0.5, (QUERIES, 2))
    boxes = np.concatenate([generator.uniform(0.2, 0.8, (QUERIES, 2)), sizes], axis=1)
    return meta, probabilities.astype(np.float32), boxes.astype(np.float32)


def ours(folder: str, compat: str, meta: dict, probabilities: np.ndarray, boxes: np.ndarray) -> float:
    reward = GroundingDino(folder, device=None, compat=compat)
    reward.model = Planted(probabilities, boxes)
    rollout = SimpleNamespace(
        images=np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8), prompts=[Prompt("0", "a prompt", "", meta)]
    )
    return float(reward(rollout).total[0])


def released(meta: dict, probabilities: np.ndarray, boxes: np.ndarray) -> float:
    """The released scorer: every mention of a noun takes every box for which the mean over the
    noun's tokens is above 0.3."""
    nouns, found_boxes, position = meta["nouns"], [], 1  # [CLS] stands first, and a full stop follows each noun
    if not nouns:
        return 1.0
    for noun in nouns:
        words = noun.split()
        ends = {position, position + len(words) - 1}
        name = noun if len(words) < 3 else f"{words[0]} {words[-1]}"
        for query in range(QUERIES):
            score = np.mean([probabilities[query, token] for token in ends])
            if score > 0.3:
                found_boxes.append((name, float(score), boxes[query].tolist()))
        position += len(words) + 1
    names = [name for name, _, _ in found_boxes]
    if meta["task_type"] == "spatial":
        return spatial(found_boxes, names, meta["spatial_info"])
    if meta["task_type"] == "numeracy":
        return sum(counted(found_boxes, item) for item in meta["numeracy_info"]) / len(meta["numeracy_info"])
    return sum(noun in names for noun in nouns) / len(nouns)


def spatial(found_boxes: list, names: list[str], info: dict) -> float:
    if info["obj1"] == info["obj2"]:
        return 0.0
    present = [info[key] in names for key in ("obj1", "obj2")]
    if not all(present):
        return 0.2 * sum(present)
    one, two = (
        max((row for row in found_boxes if row[0] == info[key]), key=lambda row: row[1])[2] for key in ("obj1", "obj2")
    )
    return 0.4 + 0.5 * position(one, two, info["locality"])


def position(one: list[float], two: list[float], relation: str) -> float:
    if relation in ("near", "next to"):
        return 1.0
    across, down = two[0] - one[0], two[1] - one[1]
    forward = {
        "left of": across,
        "on the left of": across,
        "right of": -across,
        "below": -down,
        "on the bottom of": -down,
        "on the top of": down,
    }
    aside = down if relation in ("left of", "on the left of", "right of") else across
    if relation not in forward or forward[relation] <= 0 or abs(aside) >= forward[relation]:
        return 0.0
    overlap = overlap_of(*([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in (one, two)))
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def overlap_of(one: list[float], two: list[float]) -> float:
    shared = np.prod([max(0.0, min(one[i + 2], two[i + 2]) - max(one[i], two[i])) for i in (0, 1)])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return float(shared / (areas[0] + areas[1] - shared))


def counted(found_boxes: list, item: dict) -> float:
    """Suppression at 0.5 that reads centre and size as two corners."""
    rows = sorted((row for row in found_boxes if row[0] == item["obj_name"]), key=lambda row: -row[1])
    survivors: list = []
    for _, _, box in rows:
        if all(overlap_of(box, other) <= 0.5 for other in survivors):
            survivors.append(box)
    return 1.0 if len(survivors) == item["num"] else 0.2 if rows else 0.0


def test_released_is_the_released_scorer_on_planted_cases(folder, monkeypatch):
    loaded = GroundingDino(folder, device=None)
    monkeypatch.setattr("t2i_rl.rewards.gdino.load_model", lambda *args, **settings: loaded.model)
    monkeypatch.setattr(
        "t2i_rl.rewards.gdino.load_part",
        lambda kind, *args: loaded.image_processor if "Image" in kind.__name__ else loaded.tokenizer,
    )
    generator, differences, kinds = np.random.default_rng(0), 0, set()
    for number in range(CASES):
        planted = case(generator)
        expected = released(*planted)
        assert ours(folder, "released", *planted) == pytest.approx(expected, abs=1e-5), (number, planted)
        differences += abs(ours(folder, "paper", *planted) - expected) > 1e-3
        kinds.add((planted[0]["task_type"], round(expected, 1)))
    assert differences > CASES / 5 and len(kinds) > 12  # the cases tell the two scorers apart


BOX = np.array([[0.5, 0.5, 0.1, 0.1]], dtype=np.float32)


@pytest.mark.parametrize(
    ("nouns", "probabilities", "paper", "by_released"),
    [
        (["traffic light"], {1: 0.1, 2: 0.45}, 1.0, 0.0),  # the mean of a noun's tokens is 0.275
        (["cat", "dog"], {1: 0.5, 3: 0.4}, 0.5, 1.0),  # one box serves every noun above the threshold
        (["cat", "cat", "dog"], {1: 0.9, 3: 0.9}, 0.5, 2 / 3),  # a noun counts as often as it is named
        (["computer mouse pad", "cat"], {1: 0.9, 2: 0.9, 3: 0.9}, 0.5, 0.0),  # three words are never found
    ],
)
def test_what_tells_released_from_paper(folder, nouns, probabilities, paper, by_released):
    scores_of_tokens = np.full((1, 40), 0.01, dtype=np.float32)
    for token, value in probabilities.items():
        scores_of_tokens[0, token] = value
    meta = {"nouns": nouns, "task_type": "object"}
    assert ours(folder, "paper", meta, scores_of_tokens, BOX) == pytest.approx(paper)
    assert ours(folder, "released", meta, scores_of_tokens, BOX) == pytest.approx(by_released)


@pytest.mark.parametrize(("kind", "score"), [("complex", 1.0), ("spatial", 0.4)])
def test_the_task_type_decides_and_not_the_annotation(folder, kind, score):
    scores_of_tokens = np.full((2, 40), 0.01, dtype=np.float32)
    scores_of_tokens[0, 1], scores_of_tokens[1, 3] = 0.9, 0.8
    boxes = np.array([[0.8, 0.5, 0.1, 0.1], [0.2, 0.5, 0.1, 0.1]], dtype=np.float32)  # the cat on the wrong side
    info = {"obj1": "cat", "obj2": "dog", "locality": "left of"}
    meta = {"nouns": ["cat", "dog"], "task_type": kind, "spatial_info": info}
    assert ours(folder, "released", meta, scores_of_tokens, boxes) == pytest.approx(score)


def test_one_noun_twice_scores_nothing_as_a_relation_and_its_nouns_elsewhere(folder):
    scores_of_tokens = np.full((1, 40), 0.9, dtype=np.float32)
    info = {"obj1": "cat", "obj2": "cat", "locality": "near"}
    scores = [
        ours(folder, "released", {"nouns": ["cat"], "task_type": kind, "spatial_info": info}, scores_of_tokens, BOX)
        for kind in ("spatial", "complex")
    ]
    assert scores == [0.0, 1.0]


def test_a_prompt_without_nouns_scores_one_beside_prompts_with_nouns(folder):
    reward = GroundingDino(folder, device=None, compat="released")
    metas = [
        {"nouns": ["cat"], "task_type": "object"},
        {"nouns": [], "task_type": "non"},
        {"nouns": ["dog"], "task_type": "object"},
    ]
    prompts = [Prompt(str(number), "a prompt", "", meta) for number, meta in enumerate(metas)]
    assert [reward.refuses(prompt) for prompt in prompts] == [None] * 3
    images = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 3)).astype(np.uint8)
    together = reward(SimpleNamespace(images=images, prompts=prompts)).total
    alone = reward(SimpleNamespace(images=images[2:], prompts=prompts[2:])).total
    assert together[1] == 1.0 and together[2] == alone[0]


@pytest.mark.parametrize("kind", ["spatial", "numeracy"])
def test_a_task_type_without_its_annotation_is_refused_where_the_task_type_decides(folder, kind):
    reward = GroundingDino(folder, device=None, compat="released")
    assert f"no {kind}_info" in reward.refuses(Prompt("0", "x", "", {"nouns": ["cat"], "task_type": kind}))


def test_both_of_t2i_r1s_scorers_that_go_by_the_kind_agree_on_it():
    for meta in (
        {"nouns": ["cat"], "task_type": "complex", "spatial_info": {"obj1": "cat"}},
        {"nouns": ["cat"], "numeracy_info": [1]},
    ):
        git = GitVQA.__new__(GitVQA)
        git.ask = lambda images, questions: torch.full((len(questions),), 0.25)
        git.batch_size = 4
        rollout = SimpleNamespace(images=np.zeros((1, 4, 4, 3)), prompts=[Prompt("0", "x", "", meta)])
        assert git(rollout).total.tolist() == ([0.25] if meta.get("task_type") == "complex" else [0.0])


def test_the_orm_reads_lower_case_answers(tmp_path):
    cfg = composed("reward=orm", "reward.path=x").reward
    assert (cfg.yes_word, cfg.no_word) == ("yes", "no")
    path = save_small_orm(tmp_path / "orm")
    settings = {"question": "a {prompt} ?", "template": "{image} {question}", "dtype": "float32", "device": None}
    rollout = SimpleNamespace(images=np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8), prompts=[Prompt("0", "cat", "", {})])
    default, lower, upper = (
        float(ORM(path, **settings, **words)(rollout).total[0])
        for words in ({}, {"yes_word": "yes", "no_word": "no"}, {"yes_word": "Yes", "no_word": "No"})
    )
    assert default == lower != upper
