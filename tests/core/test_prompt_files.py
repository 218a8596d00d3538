"""Files of prompts: what belongs to a row, which files are JSON, and rows that are refused with
their place."""

import json
from types import SimpleNamespace

import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, read_json_lines, read_text
from t2i_rl.core.prompts import Prompt, read_prompts
from t2i_rl.data.make_prompts import make_prompts
from t2i_rl.data.prompts import PromptData
from t2i_rl.data.t2i_r1 import read_t2i_r1
from t2i_rl.evaluation.evaluator import Evaluator
from t2i_rl.evaluation.records import read_records
from t2i_rl.methods.irg.teachers import GivenPictures

MARK = "\ufeff"
T2I_R1_ROW = {"task_type": "object", "prompt": "a dot", "nouns": ["dot"]}


def texts_of(path, content: str | bytes) -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [prompt.text for prompt in read_prompts(path)]


def refusal(reader, path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        reader(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_byte_order_mark_is_no_part_of_any_row(tmp_path):
    row = json.dumps({"prompt": "a dot"})
    assert texts_of(tmp_path / "p.jsonl", f"{MARK}{row}\n") == ["a dot"]
    assert texts_of(tmp_path / "p.txt", f"{MARK}a dot\n{MARK}two dots\n") == ["a dot", "two dots"]  # two files joined
    assert texts_of(tmp_path / "p.json", f"{MARK}[{row}]") == ["a dot"]
    (tmp_path / "t.jsonl").write_text(MARK + json.dumps(T2I_R1_ROW), encoding="utf-8")
    assert read_t2i_r1(str(tmp_path / "t.jsonl"))[0].text == "a dot"
    (tmp_path / "images.jsonl").write_text(MARK + json.dumps({"prompt": "a dot", "image": "a.png"}), encoding="utf-8")
    GivenPictures(str(tmp_path)).files["a dot"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c"])
def test_a_row_ends_at_a_line_feed_and_nowhere_else(tmp_path, separator):
    text = f"a red{separator}dot"
    row = {"prompt": text, "image": "a.png", **T2I_R1_ROW, "nouns": ["dot"]} | {"prompt": text}
    line = json.dumps(row, ensure_ascii=False)
    if separator in "\u2028\u2029\u0085":  # JSON wants the other two escaped
        assert texts_of(tmp_path / "p.jsonl", f"{line}\n") == [text]
        assert read_t2i_r1(str(tmp_path / "p.jsonl"))[0].text == text
        (tmp_path / "images.jsonl").write_text(line, encoding="utf-8")
        assert list(GivenPictures(str(tmp_path)).files) == [text]
    assert texts_of(tmp_path / "p.txt", f"{text}\n") == [text]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_editor_ends_them(tmp_path, ending):
    assert texts_of(tmp_path / "p.txt", ending.join(("one", "", "two", ""))) == ["one", "two"]
    rows = ending.join(json.dumps({"prompt": text}) for text in ("one", "two"))
    assert texts_of(tmp_path / "p.jsonl", rows) == ["one", "two"]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.txt"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_the_list_that_it_is(tmp_path, name, indent):
    rows = [{"prompt": "one dot", "id": 7, "tag": "t"}, {"prompt": "two dots"}, "three dots"]
    assert texts_of(tmp_path / name, json.dumps(rows, indent=indent)) == ["one dot", "two dots", "three dots"]
    assert read_prompts(tmp_path / name)[:2] == [Prompt("7", "one dot", "t"), Prompt("p/00002", "two dots")]


def test_a_prompt_may_begin_with_a_bracket_or_be_long(tmp_path):
    assert texts_of(tmp_path / "p.txt", "[red] dot\n[a, b] two dots\n5\n") == ["[red] dot", "[a, b] two dots", "5"]
    assert texts_of(tmp_path / "p.txt", "dot " * 1_000_000) == [("dot " * 1_000_000).strip()]


def test_ids_are_text_or_whole_numbers_and_the_lines_number_stands_in(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "a"}\n{"prompt": "a", "id": 3}\n{"prompt": "a", "id": "x"}\n')
    assert [prompt.id for prompt in read_prompts(path)] == ["p/00002", "3", "x"]


FAULTS = {
    "a number": ({"prompt": 5}, "the prompt is no text: 5"),
    "a list": ({"prompt": ["a dot"]}, "the prompt is no text"),
    "an object": ({"prompt": {"text": "a dot"}}, "the prompt is no text"),
    "null": ({"prompt": None}, "the prompt is no text: null"),
    "nothing": ({"prompt": ""}, "the prompt is empty"),
    "blanks": ({"prompt": " \n\u2028\ufeff\u200b"}, "the prompt is empty"),
    "half a letter": ({"prompt": "a \ud83d dot"}, "half of a character"),
    "a NUL": ({"prompt": "a\0dot"}, "a NUL character"),
    "no prompt": ({"text": "a dot"}, "'prompt' field"),
    "a tag that is a number": ({"prompt": "a dot", "tag": 5}, "the tag is no text: 5"),
    "a tag that is null": ({"prompt": "a dot", "tag": None}, "the tag is no text: null"),
    "an id that is a fraction": ({"prompt": "a dot", "id": 1.5}, "the id is no text: 1.5"),
    "an id that is true": ({"prompt": "a dot", "id": True}, "the id is no text"),
    "an id that is null": ({"prompt": "a dot", "id": None}, "the id is no text"),
    "an empty id": ({"prompt": "a dot", "id": ""}, "the id is empty"),
    "a row that is a number": (5, "JSON object"),
    "a row that is a text": ("a dot", "JSON object"),
    "a row that is a list": (["a dot"], "JSON object"),
    "a row that is null": (None, "JSON object"),
    "a clause without a class": ({"prompt": "a dot", "include": [{"count": 1}]}, "without a class"),
    "a clause without a count": ({"prompt": "a dot", "include": [{"class": "dot", "count": "one"}]}, "without a count"),
    "clauses that are no list": ({"prompt": "a dot", "exclude": {"class": "dot"}}, "no list of clauses"),
    "a position of a later clause": (
        {"prompt": "a dot", "include": [{"class": "dot", "count": 1, "position": ["above", 0]}]},
        "an earlier clause",
    ),
    "a colour that is a number": ({"prompt": "a", "include": [{"class": "dot", "count": 1, "color": 5}]}, "no word"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_prompt_that_is_none_is_refused_with_its_line(tmp_path, name):
    row, said = FAULTS[name]
    content = json.dumps({"prompt": "one dot"}) + "\n\n" + json.dumps(row) + "\n"
    message = refusal(read_prompts, tmp_path / "p.jsonl", content)
    assert f"{tmp_path / 'p.jsonl'}:3: " in message and said in message
    refusal(lambda path: PromptData(str(path), batch_size=1), tmp_path / "p.jsonl", content)
    if name not in ("a row that is a text", "a row that is null"):
        message = refusal(read_prompts, tmp_path / "p.json", json.dumps([{"prompt": "one dot"}, row]))
        assert f"{tmp_path / 'p.json'}: row 2: " in message and said in message


def test_what_t2i_r1_reads_is_no_less_checked(tmp_path):
    for fault in ({"id": None}, {"id": 1.5}, {"prompt": "a\0"}, {"prompt": ["a"]}, {"include": [{}]}):
        assert "t.jsonl:1: " in refusal(read_t2i_r1, tmp_path / "t.jsonl", json.dumps(T2I_R1_ROW | fault))


def test_an_id_that_stands_twice_is_refused_with_both_lines(tmp_path):
    rows = [{"id": "a", "prompt": "one dot"}, {"id": "a", "prompt": "two dots"}]
    message = refusal(read_prompts, tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert "p.jsonl:2: the id 'a' stands already" in message and "p.jsonl:1" in message
    number_and_text = [{"id": 5, "prompt": "one dot"}, {"id": "5", "prompt": "two dots"}]
    refusal(read_prompts, tmp_path / "p.jsonl", "\n".join(map(json.dumps, number_and_text)))
    refusal(read_prompts, tmp_path / "p.jsonl", '{"prompt": "one"}\n{"id": "p/00001", "prompt": "two"}')
    full = "\n".join(json.dumps(T2I_R1_ROW | row) for row in rows)
    assert ":2: the id 'a' stands already" in refusal(read_t2i_r1, tmp_path / "t.jsonl", full)


def test_a_benchmark_whose_ids_stand_twice_is_refused_before_it_is_drawn(tmp_path):
    prompts = [Prompt("a", "one dot"), Prompt("a", "two dots")]
    benchmark = SimpleNamespace(samples_per_prompt=1, prompts=lambda: prompts)
    with pytest.raises(UserError, match="prompt 1 of the benchmark: the id 'a' stands already"):
        Evaluator(torch.nn.Identity(), benchmark, "direct", tmp_path, seed=0).test_dataloader()


BROKEN = {
    "UTF-16": ("p.txt", "a dot\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without its mark": ("p.txt", "a dot\n".encode("utf-16-le"), "p.txt:1: a NUL byte"),
    "Latin-1": ("p.txt", "ein Kr\u00fcmel\n".encode("latin-1"), "UTF-8"),
    "a NUL": ("p.txt", b"a dot\nb\0\n", "p.txt:2: a NUL byte"),
    "nothing": ("p.txt", b"", "holds no prompt"),
    "blank lines": ("p.jsonl", b"\n \r\n", "holds no prompt"),
    "an empty array": ("p.json", b"[]", "holds no prompt"),
    "an array without its end": ("p.txt", b'[\n{"prompt": "a dot"},\n', "not JSON"),
    "an array of texts without its end": ("p.txt", b'["a dot",\n"b"', "not JSON"),
    "an array in a row": ("p.txt", b'a dot\n["a"]\n', "p.txt:2: a JSON list"),
    "a row that is cut": ("p.txt", b'{"prompt": "a dot"}\n{"prompt": "b', "p.txt:2 is not JSON"),
    "plain text among JSON": ("p.txt", b'{"prompt": "a dot"}\nanother dot\n', "p.txt:2 is not JSON"),
    "a key twice": ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
    "a NaN": ("p.jsonl", b'{"prompt": "a", "weight": NaN}', "NaN is no number"),
    "a number without end": ("p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
    "brackets without end": ("p.jsonl", b'{"prompt": ' + b"[" * 100_000, "not JSON"),
    "a table": ("p.csv", b"prompt,id\na dot,1\n", ".csv"),
    "an object for everything": ("p.json", b'{"0": {"prompt": "a dot"}}', "'prompt' field"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_holds_no_prompts_is_one_line(tmp_path, name):
    file, content, said = BROKEN[name]
    assert said in refusal(read_prompts, tmp_path / file, content)


def test_a_folder_and_a_name_that_cannot_be_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        for reader in (read_prompts, read_t2i_r1, read_text, read_json, read_json_lines, read_records):
            with pytest.raises(UserError, match="cannot be read|does not exist"):
                reader(path)


def test_a_broken_clause_of_a_benchmark_to_keep_off_is_named(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "include": [{"count": 1}]}\n')
    with pytest.raises(UserError, match="b.jsonl:1: include has a clause without a class"):
        make_prompts({}, 0, [{"prompt": prompt.text, **prompt.meta} for prompt in read_prompts(tmp_path / "b.jsonl")])
