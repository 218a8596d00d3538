"""Annotated prompts: T2I-R1's own file, files made here, and rows that are refused."""

import json
from collections import Counter
from pathlib import Path

import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import read_prompts
from t2i_rl.data.make_prompts import KINDS, make_prompts, meaning
from t2i_rl.data.t2i_r1 import T2IR1Data, plain, read_t2i_r1
from t2i_rl.data.words import MORE_OBJECTS, OBJECTS, plural, with_article
from t2i_rl.rewards.boxes import SIDES, nouns_of
from t2i_rl.rewards.git_vqa import phrases_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
FILE = SHARED / "t2i_r1" / "geneval_and_t2i_data_final.jsonl"
GENEVAL = SHARED / "geneval" / "evaluation_metadata.jsonl"
needs_file = pytest.mark.skipif(not FILE.exists(), reason="T2I-R1's file is not beside this checkout")


@needs_file
def test_t2i_r1s_own_file_loads_whole():
    data = T2IR1Data(str(FILE))
    counts = Counter(prompt.tag for prompt in data.prompts)
    assert counts == {
        "spatial": 2195,
        "numeracy": 1172,
        "color": 879,
        "complex": 700,
        "non": 700,
        "texture": 695,
        "shape": 682,
        "object": 200,
    }
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
    """In whatever words: the same pair in the other order, the same relation told from the other
    side, GenEval's own plurals."""
    barred = [{"prompt": prompt.text, **prompt.meta} for prompt in read_prompts(GENEVAL)]
    counts = {"two_object": 2000, "position": 2000, "counting": 150, "colors": 300, "single_object": 20}
    meant = {meaning(row) for row in barred}
    rows_of_all, clean = make_prompts(counts, 0), make_prompts(counts, 0, barred)
    for kind in counts:
        assert meant & {meaning(row) for row in rows_of_all if row["tag"] == kind}, kind
    assert not meant & set(map(meaning, clean)) and len(clean) == sum(counts.values())
    texts = {plain(row["prompt"]) for row in barred}
    assert not texts & {plain(row["prompt"]) for row in clean}


def test_meanings_are_told_apart_by_what_is_asked_for():
    def relation(first, side, second):
        return meaning({"prompt": "", "include": [{"class": second}, {"class": first, "position": [side, 0]}]})

    assert relation("cat", "left of", "dog") == relation("dog", "right of", "cat") != relation("dog", "left of", "cat")
    assert relation("cat", "above", "dog") == relation("dog", "below", "cat") != relation("cat", "below", "dog")
    two, swapped = ({"prompt": "", "include": [{"class": a}, {"class": b}]} for a, b in ("xy", "yx"))
    assert meaning(two) == meaning(swapped)
    colored = [{"prompt": "", "attr_nouns": ["a"], "include": [{"class": "x", "color": c}]} for c in ("red", "blue")]
    assert meaning(colored[0]) != meaning(colored[1])


def test_what_is_made_is_annotated_unique_and_loads(tmp_path):
    counts = dict.fromkeys(KINDS, 40)
    rows = make_prompts(counts, seed=3)
    assert Counter(row["tag"] for row in rows) == counts
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert rows == make_prompts(counts, seed=3) != make_prompts(counts, seed=4)
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
    assert article == {
        "scissors": "",
        "umbrella": "an ",
        "airplane": "an ",
        "elephant": "an ",
        "apple": "an ",
        "orange": "an ",
        "oven": "an ",
        "envelope": "an ",
    }.get(noun, "a ")


def test_plurals_are_right():
    expected = {
        "bus": "buses",
        "bench": "benches",
        "toothbrush": "toothbrushes",
        "knife": "knives",
        "wine glass": "wine glasses",
        "person": "people",
        "sheep": "sheep",
        "cell phone": "cell phones",
        "couch": "couches",
        "sandwich": "sandwiches",
        "computer mouse": "computer mice",
        "leaf": "leaves",
        "shelf": "shelves",
        "toy": "toys",
        "berry": "berries",
        "kite": "kites",
        "watch": "watches",
    }
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
            "num of 1",
        ),
    ],
)
def test_a_broken_row_is_refused_by_name(tmp_path, row, named):
    good = {"prompt": "a photo of a dog", "nouns": ["dog"], "task_type": "object"}
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "a photo of a car", **row}) + "\n")
    with pytest.raises(UserError) as error:
        read_t2i_r1(str(file))
    assert named in str(error.value) and f"{file}:2" in str(error.value) and "\n" not in str(error.value)


def test_twice_the_same_prompt_an_unknown_kind_and_too_many_are_refused(tmp_path):
    row = json.dumps({"prompt": "a photo of a dog", "nouns": ["dog"], "task_type": "object"})
    (tmp_path / "twice.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(UserError, match=r"twice.jsonl:2: .* earlier one"):
        read_t2i_r1(str(tmp_path / "twice.jsonl"))
    (tmp_path / "broken.jsonl").write_text(f"{row}\n\n{row[:20]}\n")
    with pytest.raises(UserError, match="broken.jsonl:3 is not JSON"):
        read_t2i_r1(str(tmp_path / "broken.jsonl"))
    with pytest.raises(UserError, match=r"\[object\]"):
        T2IR1Data(str(tmp_path / "broken.jsonl"), task_types="object")
    with pytest.raises(UserError, match="choose from"):
        T2IR1Data(str(tmp_path / "twice.jsonl"), task_types=("sizes",))
    for counts, named in (
        ({"sizes": 1}, "choose from"),
        ({"single_object": 1000}, "only"),
        ({"counting": "many"}, "whole number"),
        ({"counting": -1}, "0 or more"),
    ):
        with pytest.raises(UserError, match=named):
            make_prompts(counts, 0)
    assert make_prompts({"single_object": 0}, 0) == []


def test_a_kind_can_be_used_up():
    for seed in range(5):
        rows = make_prompts({"single_object": len(OBJECTS) + len(MORE_OBJECTS)}, seed)
        assert len(rows) == len({*OBJECTS, *MORE_OBJECTS})


def test_a_file_that_is_not_text_and_odd_rows_are_one_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_t2i_r1(str(file))
    row = {"prompt": "a dog\u2028and a cat", "nouns": ["dog"], "task_type": "object"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_t2i_r1(str(file))[0].text == row["prompt"] == read_prompts(file)[0].text
    for fault in (
        {"task_type": ["object"]},
        {"prompt": " "},
        {"numeracy_info": 5},
        {"spatial_info": None},
        {"numeracy_info": [{"obj_name": "cat", "num": 1}]},
        {"spatial_info": {"obj1": "dog", "obj2": "cat", "locality": "near"}},
    ):
        file.write_text(json.dumps({**row, **fault}) + "\n")
        with pytest.raises(UserError, match="prompts.jsonl:1"):
            read_t2i_r1(str(file))
