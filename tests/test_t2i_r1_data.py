"""Annotated prompts: T2I-R1's own file, files made here, and rows that are refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from t2i_rl.data.make_prompts import KINDS, make_prompts
from t2i_rl.data.t2i_r1 import T2IR1Data, plain, read_t2i_r1
from t2i_rl.data.words import MORE_OBJECTS, OBJECTS, plural, with_article
from t2i_rl.errors import UserError
from t2i_rl.prompts import read_prompts
from t2i_rl.rewards.boxes import SIDES, nouns_of
from t2i_rl.rewards.git_vqa import phrases_of

SHARED = Path(__file__).parents[2] / "shared" / "data"
FILE = SHARED / "t2i_r1" / "geneval_and_t2i_data_final.jsonl"
GENEVAL = SHARED / "geneval" / "evaluation_metadata.jsonl"
needs_file = pytest.mark.skipif(not FILE.exists(), reason="../shared/data is not beside this checkout")


@needs_file
def test_t2i_r1s_own_file_loads_whole():
    data = T2IR1Data(str(FILE))
    counts = Counter(prompt.tag for prompt in data.prompts)
    assert counts == {"spatial": 2195, "numeracy": 1172, "color": 879, "complex": 700, "non": 700, "texture": 695, "shape": 682, "object": 200}  # fmt: skip
    assert len({prompt.text for prompt in data.prompts}) == 7223 and data.left_out == 0
    assert all(prompt.meta["task_type"] == prompt.tag and nouns_of(prompt.meta) for prompt in data.prompts)


@needs_file
def test_its_prompts_are_not_geneval_s_and_can_be_left_out(tmp_path):
    assert T2IR1Data(str(FILE), exclude=str(GENEVAL)).left_out == 0
    barred = tmp_path / "benchmark.txt"
    barred.write_text("A photo of a car below a zebra.\nsomething else\n")
    assert T2IR1Data(str(FILE), exclude=str(barred)).left_out == 1
    assert len(T2IR1Data(str(FILE), task_types=("object", "shape")).prompts) == 882


@needs_file
def test_made_prompts_can_keep_off_a_benchmark():
    barred = {plain(prompt.text) for prompt in read_prompts(GENEVAL)}
    made = {plain(row["prompt"]) for row in make_prompts(["position", "colors"], 300, 0)}
    clean = {plain(row["prompt"]) for row in make_prompts(["position", "colors"], 300, 0, frozenset(barred))}
    assert made & barred and not clean & barred and len(clean) == 600


def test_what_is_made_is_annotated_unique_and_loads(tmp_path):
    rows = make_prompts(list(KINDS), 40, seed=3)
    assert Counter(row["tag"] for row in rows) == dict.fromkeys(KINDS, 40)
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert rows == make_prompts(list(KINDS), 40, seed=3) != make_prompts(list(KINDS), 40, seed=4)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(T2IR1Data(str(file)).prompts) == len(read_prompts(file)) == 320
    for row in rows:
        for noun in row["nouns"]:
            assert noun in row["prompt"] or plural(noun) in row["prompt"]
        assert all(phrase in row["prompt"] for phrase in row.get("attr_nouns", []))
        for item in row.get("numeracy_info", []):
            assert f"{('two', 'three', 'four')[item['num'] - 2]} {plural(item['obj_name'])}" in row["prompt"]
        if "spatial_info" in row:
            info = row["spatial_info"]
            wording = f"{with_article(info['obj1'])} {info['locality']} {with_article(info['obj2'])}"
            assert row["prompt"] == f"a photo of {wording}" and info["locality"] in SIDES
            assert row["include"][1]["position"] == [info["locality"], 0] and row["include"][0]["class"] == info["obj2"]
        assert phrases_of(row) == [] if row["task_type"] in ("spatial", "numeracy") else phrases_of(row)


@pytest.mark.parametrize("noun", [*OBJECTS, *MORE_OBJECTS])
def test_articles_are_right(noun):
    article = with_article(noun).removesuffix(noun)
    assert article == {"scissors": "", "umbrella": "an ", "airplane": "an ", "elephant": "an ", "apple": "an ", "orange": "an ", "oven": "an ", "envelope": "an "}.get(noun, "a ")  # fmt: skip


def test_plurals_are_right():
    expected = {
        "bus": "buses", "bench": "benches", "toothbrush": "toothbrushes", "knife": "knives", "wine glass": "wine glasses", "person": "people",
        "sheep": "sheep", "cell phone": "cell phones", "couch": "couches", "sandwich": "sandwiches", "computer mouse": "computer mice",
        "leaf": "leaves", "shelf": "shelves", "toy": "toys", "berry": "berries", "kite": "kites", "watch": "watches",
    }  # fmt: skip
    assert {noun: plural(noun) for noun in expected} == expected


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"nouns": ["car"], "task_type": "sizes"}, "task_type 'sizes'"),
        ({"nouns": ["car"]}, "task_type None"),
        ({"task_type": "object"}, "no 'nouns'"),
        ({"nouns": "car", "task_type": "object"}, "not words"),
        ({"nouns": ["car"], "task_type": "color"}, "no 'attr_nouns'"),
        ({"nouns": ["car"], "task_type": "spatial", "spatial_info": {"obj1": "car"}}, "locality"),
        (
            {"nouns": ["car"], "task_type": "numeracy", "numeracy_info": [{"obj_name": "car", "num": "two"}]},
            "whole num",
        ),
    ],
)
def test_a_broken_row_is_refused_by_name(tmp_path, row, named):
    good = {"prompt": "a photo of a dog", "nouns": ["dog"], "task_type": "object"}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "a photo of a car", **row}) + "\n")
    with pytest.raises(UserError) as error:
        read_t2i_r1(str(file))
    assert named in str(error.value) and "a photo of a car" in str(error.value) and "\n" not in str(error.value)


def test_twice_the_same_prompt_an_unknown_kind_and_too_many_are_refused(tmp_path):
    row = json.dumps({"prompt": "a photo of a dog", "nouns": ["dog"], "task_type": "object"})
    (tmp_path / "twice.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(UserError, match="more than once"):
        read_t2i_r1(str(tmp_path / "twice.jsonl"))
    with pytest.raises(UserError, match="choose from"):
        T2IR1Data(str(tmp_path / "twice.jsonl"), task_types=("sizes",))
    with pytest.raises(UserError, match="choose from"):
        make_prompts(["sizes"], 1, 0)
    with pytest.raises(UserError, match="ask for fewer"):
        make_prompts(["single_object"], 1000, 0)
