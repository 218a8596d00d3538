"""Broken rows of pairs in every layout, which files belong together, and what is not taken up."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.core.members import matched
from t2i_rl.data.encodings import Encodings
from t2i_rl.data.preferences import Preferences, PreferenceStream
from t2i_rl.data.sources import find_source
from t2i_rl.evaluation.records import read_job, read_records, read_results

SEPARATORS = "\u2028\u2029\u0085"


def picture(size=(8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(file, kind)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.parent


def metadata(folder: Path, *rows: object) -> Path:
    (folder / "a.png").write_bytes(picture())
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def coco(folder: Path, table: object) -> Path:
    for name in ("annotations", "train2017"):
        (folder / name).mkdir(exist_ok=True)
    for name in "ab":
        (folder / "train2017" / f"{name}.png").write_bytes(picture())
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(table))
    return folder


def refusal(folder: Path, layout: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        find_source(str(folder), layout, "train2017")
    assert "\n" not in str(error.value) and "object at" not in str(error.value)
    return str(error.value)


NO_CAPTIONS = {
    "a number": 5,
    "null": None,
    "an object": {"x": 1},
    "a list with a number": ["a", 5],
    "a list with null": ["a", None],
    "a list of nothing": [],
    "a list with a blank": ["a", " "],
    "a blank": " \u2028 ",
    "half a letter": "a\ud83d",
}


@pytest.mark.parametrize("name", NO_CAPTIONS)
def test_a_caption_that_is_none_is_refused_with_file_and_row(name, tmp_path):
    caption = NO_CAPTIONS[name]
    row = json.dumps({"file_name": "a.png", "text": caption})
    assert "metadata.jsonl:2: text" in refusal(metadata(tmp_path, {"file_name": "a.png", "text": "x"}, row))
    folder = tmp_path / "w"
    folder.mkdir()
    for key in ("caption", "text"):
        tar(folder / "0.tar", {"a.png": picture(), "a.json": json.dumps({key: caption})})
        assert f"0.tar: a.json: {key}: the caption" in refusal(folder)
    table = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 9, "image_id": 1, "caption": caption}]}
    (tmp_path / "c").mkdir()
    assert "annotations: id 9: caption: the caption" in refusal(coco(tmp_path / "c", table))
    if name in ("null", "a number", "a blank", "a list with null", "a list of nothing"):
        (tmp_path / "p").mkdir()
        good = ["a"] if isinstance(caption, list) else 4 if isinstance(caption, int) else "a"
        columns = {"image": [picture()] * 2, "text": [good, caption]}
        pq.write_table(pa.table(columns), tmp_path / "p/0.parquet")
        said = "row 0: text" if name == "a number" else "row 1: text"
        assert f"0.parquet: {said}: the caption" in refusal(tmp_path / "p")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        "null",
        '["a.png", "x"]',
        '{"text": "x"}',
        '{"file_name": 5, "text": "x"}',
        '{"file_name": "a.png"}',
        '{"file_name": "", "text": "x"}',
    ],
)
def test_a_broken_row_of_metadata_is_named(line, tmp_path):
    assert "metadata.jsonl:3" in refusal(metadata(tmp_path, {"file_name": "a.png", "text": "x"}, "", line))


def test_metadata_may_hold_what_json_may_hold(tmp_path):
    rows = [{"file_name": "a.png", "text": f"a red{separator}dot"} for separator in SEPARATORS]
    metadata(tmp_path, "\ufeff" + json.dumps({"file_name": "a.png", "caption": "one"}), *rows)
    assert find_source(str(tmp_path), "auto", "").captions == [["one", *["a red dot"] * 3]]
    metadata(tmp_path, json.dumps([{"file_name": "a.png", "text": "x"}], indent=1))
    assert find_source(str(tmp_path), "auto", "").captions == [["x"]]


IMAGES, TEXTS = [{"id": 1, "file_name": "a.png"}], [{"id": 9, "image_id": 1, "caption": "x"}]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "no list 'images'"),
        ({"images": IMAGES}, "no list 'annotations'"),
        ({"images": IMAGES, "annotations": None}, "no list 'annotations'"),
        ({"images": IMAGES, "annotations": [{"id": 9, "image_id": 1}]}, "annotations: id 9: there is no caption"),
        (
            {"images": IMAGES, "annotations": [{"image_id": 1, "caption": "x"}]},
            "annotations: row 0: not an object with an id",
        ),
        ({"images": IMAGES, "annotations": [5]}, "annotations: row 0: not an object with an id"),
        ({"images": IMAGES, "annotations": TEXTS * 2}, "annotations: row 1: the id 9 stands twice"),
        ({"images": IMAGES * 2, "annotations": TEXTS}, "images: row 1: the id 1 stands twice"),
        (
            {"images": [*IMAGES, {"id": 2, "file_name": "a.png"}], "annotations": TEXTS},
            "images: id 2 has the file of id 1",
        ),
        ({"images": [{"id": 1}], "annotations": TEXTS}, "images: id 1: file_name is no text"),
        ({"images": IMAGES, "annotations": [{"id": 9, "image_id": 7, "caption": "x"}]}, "no images with captions"),
    ],
)
def test_a_broken_table_of_coco_is_named(table, said, tmp_path):
    assert said in refusal(coco(tmp_path, table))


def test_what_a_table_does_not_name_is_counted(tmp_path, capsys):
    stray = {"id": 10, "image_id": 7, "caption": "x"}
    source = find_source(str(coco(tmp_path, {"images": IMAGES, "annotations": [*TEXTS, stray]})), "auto", "train2017")
    assert len(source) == 1 and len(source.ignored) == 2 and source.ignored[1].endswith("b.png")
    assert f"{tmp_path}: 2 members ignored (first: " in capsys.readouterr().out
    (tmp_path / "m").mkdir()
    (metadata(tmp_path / "m", {"file_name": "./a.png", "text": "x"}) / "b.jpg").write_bytes(picture())
    assert [Path(name).name for name in find_source(str(tmp_path / "m"), "auto", "").ignored] == ["b.jpg"]


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_names_may_have_dots_and_endings_capitals(layout, tmp_path, capsys):
    members = {
        "22.05.jpg": picture(kind="JPEG"),
        "22.05.txt": "\ufeffone\u2028half\r\n\r\ntwo\r",
        "22.06.PNG": picture(),
        "22.06.TXT": "three",
        "b.tif": picture(kind="TIFF"),
        "b.json": '{"caption": ["four", "five"]}',
        "c.GIF": picture(kind="GIF"),
        "c.caption.txt": "six",
        "d.image.jpg": picture(kind="JPEG"),
        "d.caption.txt": "seven",
        "sub/e.png": picture(),
        "sub/e.txt": "eight",
        "sub/e.json": '{"caption": null}',
        "sub/e.mask.png": picture(),
        "._e.png": b"of an operating system",
        "f.mp4": b"",
        "g.txt": "no picture",
    }
    if layout == "webdataset":
        tar(tmp_path / "0.tar", members)
    for name, content in members.items() if layout == "folder" else ():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    source = find_source(str(tmp_path), "auto", "")
    captions = [["one half", "two"], ["three"], ["four", "five"], ["six"], ["seven"], ["eight"]]
    assert sorted(source.captions) == sorted(captions) and len(set(source.names)) == 6
    assert all(source.image(item).size == (8, 8) for item in range(6))
    ignored = sorted(name.replace("0.tar: ", "0.tar/").rpartition("/")[2] for name in source.ignored)
    assert ignored == ["._e.png", "e.mask.png", "f.mp4", "g.txt"]
    assert f"{tmp_path}: 4 members ignored (first: " in capsys.readouterr().out


def test_texts_go_with_images_by_their_names():
    assert matched(["a.left.jpg", "a.right.jpg", "a.txt"]).lacking == ["a.left.jpg", "a.right.jpg"]
    assert matched(["22.05.jpg", "22.06.txt"]).lacking == ["22.05.jpg"]
    assert matched(["22.05.jpg", "22.06.jpg", "22.06.txt"]).lacking == ["22.05.jpg"]
    assert matched(["./a.jpg", "./a.txt"]).pairs == [("./a.jpg", "./a.txt")]
    assert matched(["x.d/a.jpg", "x.d/a.txt", "x.d/a.json"]).ignored == []
    assert matched(["a.jpg", "a.caption.txt", "a.txt"]).pairs == [("a.jpg", "a.txt")]
    with pytest.raises(UserError, match="a.txt and a.TXT"):
        matched(["a.jpg", "a.txt", "a.TXT"])


def test_shards_in_capitals_are_read_and_loose_pictures_beside_them_counted(tmp_path):
    tar(tmp_path / "0.TAR", {"a.png": picture(), "a.txt": "x"})
    (tmp_path / "b.png").write_bytes(picture())
    source = find_source(str(tmp_path), "auto", "")
    assert source.captions == [["x"]] and source.ignored == [str(tmp_path / "b.png")]


def test_a_shard_that_is_not_whole_is_refused(tmp_path):
    two = {"a.png": picture(), "a.txt": "x", "b.png": picture(), "b.txt": "y"}
    whole = (tar(tmp_path / "0.tar", two) / "0.tar").read_bytes()
    for content, said in (
        (whole[: 4 * 1024], "cut short"),  # between two members
        (whole[: 3 * 512 + 100], "not a plain tar|cut short"),
        (whole + whole, "another tar was joined"),
        (whole[:2048] + b"x" * 512 + whole[2560:], "damaged"),  # the header of the second pair
    ):
        (tmp_path / "0.tar").write_bytes(content)
        message = refusal(tmp_path)
        assert "0.tar: " in message and any(part in message for part in said.split("|"))


def test_broken_texts_of_a_shard_are_named(tmp_path):
    for members, said in (
        ({"a.png": picture(), "a.txt": "Kr\u00fcmel".encode("latin-1")}, "0.tar: a.txt is not UTF-8"),
        ({"a.png": picture(), "a.txt": "x".encode("utf-16")}, "0.tar: a.txt is UTF-16"),
        ({"a.png": picture(), "a.txt": " \n"}, "0.tar: a.txt: the caption is empty"),
        ({"a.png": picture(), "a.json": "{"}, "0.tar: a.json is not JSON"),
        ({"a.png": picture(), "a.json": "null"}, "0.tar: a.json: expected a JSON object"),
        ({"a.png": picture(), "a.json": "{}"}, "0.tar: a.json: there is no caption or text"),
        ({"a.png": picture()}, "a.png has no caption"),
        ({"a.png": picture(), "a.jpg": picture(), "a.txt": "x"}, "a has two images"),
    ):
        assert said in refusal(tar(tmp_path / "0.tar", members))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("a.txt", "a.png", "a.png"):
            archive.addfile(tarfile.TarInfo(name))
    assert "a.png stands twice" in refusal(tmp_path)
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.png").write_bytes(picture())
    (tmp_path / "f/a.txt").write_bytes("Kr\u00fcmel".encode("latin-1"))
    assert "a.txt is not UTF-8" in refusal(tmp_path / "f")


def test_a_row_of_parquet_without_an_image_is_named(tmp_path):
    images = [
        {"bytes": picture(), "path": None},
        None,
        {"bytes": None, "path": "none.png"},
        {"bytes": None, "path": None},
    ]
    pq.write_table(pa.table({"image": images, "text": list("abcd")}), tmp_path / "0.parquet")
    source = find_source(str(tmp_path), "auto", "")
    assert source.image(0).size == (8, 8)
    for item, said in (
        (1, "0.parquet: row 1: its image is NoneType"),
        (2, "none.png does not exist"),
        (3, "row 3: its"),
    ):
        with pytest.raises(UserError, match=said):
            source.image(item)


def test_a_picture_that_went_away_is_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("x")
    source = find_source(str(tmp_path), "auto", "")
    with pytest.raises(UserError, match="a.png cannot be read as an image: it is empty"):
        source.image(0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="a.png does not exist"):
        source.image(0)


GOOD = {"prompt": "a dot", "preferred": "a.png", "other": "a.png"}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        '{"preferred": "a.png", "other": "a.png"}',
        *(
            json.dumps(GOOD | fault)
            for fault in ({"prompt": None}, {"prompt": " "}, {"preferred": 5}, {"other": "none.png"})
        ),
    ],
)
def test_a_broken_row_of_preferences_is_named(line, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "preferences.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError, match=r"preferences.jsonl:3"):
        Preferences(str(tmp_path), batch_size=1)


def test_preferences_may_hold_blank_lines_marks_and_separators_but_pictures_of_one_size(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture((8, 16)))
    rows = [GOOD | {"prompt": f"a{separator}dot"} for separator in SEPARATORS]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "preferences.jsonl").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    assert Preferences(str(tmp_path), batch_size=1).rows == rows
    stream = PreferenceStream(tmp_path, [GOOD | {"other": "b.png"}], 1, 0, 0)
    with pytest.raises(UserError, match="a.png has 8x8 and b.png has 8x16"):
        next(iter(stream))


@pytest.mark.parametrize("content", ["[]", "{", '{"format": "t2i_rl.encodings.1", "images": 1, "texts": 0}'])
def test_a_broken_record_of_encodings_is_named(content, tmp_path):
    (tmp_path / "about.json").write_text(content)
    (tmp_path / "images-00000 (copy).json").write_text("{}")
    with pytest.raises(UserError, match=r"about.json|\(copy\).json is no record"):
        Encodings.open(str(tmp_path))


def test_records_of_a_run_that_are_cut_or_doubled_are_named(tmp_path):
    keys = ("prompt", "tag", "seen", "seed", "plan", "plan_length", "strict", "lenient", "score", "defects", "image")
    record = {**dict.fromkeys(keys), "prompt_id": "a", "sample_index": 0}
    path = tmp_path / "records.jsonl"
    for second, said in (
        (json.dumps(record)[:40], "records.jsonl:2 is not JSON"),
        (json.dumps(record), "records.jsonl:2: sample 0 of 'a' stands twice"),
        (json.dumps(record | {"prompt_id": "b", "score": np.nan}), "records.jsonl:2 is not JSON: NaN is no number"),
        (json.dumps(record | {"prompt_id": 5}), "records.jsonl:2: prompt_id must be a text"),
        ("[]", "records.jsonl:2: expected a JSON object"),
    ):
        path.write_text(f"{json.dumps(record)}\n{second}\n")
        with pytest.raises(UserError, match=said):
            read_records(path)


def test_results_of_a_wrong_shape_are_named(tmp_path):
    keys = ("task", "method", "model", "reward", "seed", "steps", "headline")
    good = {**dict.fromkeys(keys), "benchmark": {"name": "b"}, "stages": {}, "comparisons": []}
    path = tmp_path / "results.json"
    for fault, said in (
        ({"stages": []}, "stages: expected an object"),
        ({"comparisons": {}}, "comparisons: expected a list"),
        ({"comparisons": [{"a": 1, "b": 2, "metrics": 5}]}, "comparisons.0.metrics: expected an object"),
        ({"stages": {"x": {"metrics": []}}}, "stages.x.metrics: expected an object"),
        ({"seed": float("inf")}, "seed is not finite"),
        ({"columns": []}, "columns: expected an object"),
        ({"columns": {"dark": {"name": "dark"}}}, "columns.dark: the key 'label' is missing"),
        ({"tables": 5}, "tables: expected a list"),
        (
            {"tables": [{"title": "", "note": "", "columns": 5, "stages": [], "pairs": []}]},
            "tables.0.columns: expected",
        ),
    ):
        path.write_text(json.dumps(good | fault))
        with pytest.raises(UserError, match=said):
            read_results(path)
    path.write_text(json.dumps(good))
    (tmp_path / ".hydra").mkdir()
    for content in ("a: [", "a: 1", "- 5"):
        (tmp_path / ".hydra/overrides.yaml").write_text(content)
        with pytest.raises(UserError, match="overrides.yaml"):
            read_job(tmp_path)
