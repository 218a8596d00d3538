"""Stages by name, what older versions left behind, tables as data, and pictures in pages."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from t2i_rl.core.contracts import Column
from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.evaluator import read_features, write_features
from t2i_rl.evaluation.records import headline_comparison, read_records, read_results, write_results
from t2i_rl.evaluation.report.html import write_report
from t2i_rl.evaluation.report.thumbnails import PICTURE, embedded, picture_html
from t2i_rl.evaluation.stage import STAGES, Stage
from t2i_rl.evaluation.stats import aggregate, compare, compare_over_seeds
from t2i_rl.evaluation.tables import Selection, before_after_table, run_tables
from tests.support.made_up_run import make_records, make_run


@pytest.mark.parametrize(
    ("name", "side", "way", "picture", "turn"),
    [
        ("base_direct", "base", "direct", "", None),
        ("trained_plan", "trained", "plan", "", None),
        ("trained_turns", "trained", "turns", "", None),
        ("base_turn1", "base", "turns", "turn1", 1),
        ("trained_turn12", "trained", "turns", "turn12", 12),
        ("trained_stopped", "trained", "turns", "stopped", None),
        ("base_chosen", "base", "turns", "chosen", None),
        ("initial", "", "direct", "initial", None),
        ("last", "", "direct", "last", None),
    ],
)
def test_a_stage_is_read_from_its_name_and_has_it_again(name, side, way, picture, turn):
    stage = Stage.parse(name)
    assert (stage.side, stage.way, stage.picture, stage.turn, stage.name) == (side, way, picture, turn, name)


def test_pictures_of_a_drawing_are_stages_beside_it():
    assert Stage.parse("trained_turns").of("turn3") == Stage.parse("trained_turn3")
    assert [Stage.parse(name).name for name in STAGES] == list(STAGES)


def of_version_0_1(record: dict) -> dict:
    """A record as 0.1 wrote it: what is wrong in texts alone."""
    return {key: value for key, value in record.items() if key not in ("measured", "defect_kinds", "text_is")}


def test_records_of_0_1_have_the_columns_that_its_tables_had(tmp_path):
    records = make_records(0.5, 0, tasks=("colors", "counting"))
    texts = [["malformed: a red blob at (3, 4)"], ["extra: a red circle"], ["missing: a red circle"], []]
    for number, record in enumerate(records):
        record["defects"] = texts[number % 4]
    rows = [json.dumps(of_version_0_1(record)) + "\n" for record in records]
    (tmp_path / "records.jsonl").write_text("".join(rows))
    read = read_records(tmp_path / "records.jsonl")
    assert read[0]["measured"] == {"malformed": 1.0} and read[3]["measured"] == {"malformed": 0.0}
    assert read[21]["measured"] == {"malformed": 0.0, "over_counted": 1.0, "under_counted": 0.0}
    metrics = aggregate(read)
    assert metrics["malformed"]["mean"] == metrics["under_counted"]["mean"] == 0.25
    assert metrics["over_counted"]["n_images"] == 20 and metrics["malformed"]["n_images"] == 40


def test_a_turn_of_0_1_has_its_reflection_called_so_and_a_search_without_a_judge_no_columns(tmp_path):
    turn, unjudged = (of_version_0_1(record) for record in make_records(0.5, 0, per_task=1, tasks=("counting",)))
    unjudged |= {"strict": None, "lenient": None, "score": None, "defects": []}
    rows = [json.dumps(record) + "\n" for record in (turn | {"says_stop": False}, unjudged)]
    (tmp_path / "records.jsonl").write_text("".join(rows))
    turn, unjudged = read_records(tmp_path / "records.jsonl")
    assert turn["text_is"] == "reflection" and unjudged["measured"] == {} and "text_is" not in unjudged


def test_results_of_0_1_make_their_table_and_their_page(tmp_path):
    run = make_run(tmp_path / "run")
    before = before_after_table(read_results(run / "results.json"))
    old = {key: value for key, value in read_results(run / "results.json").items() if key not in ("columns", "tables")}
    (run / "results.json").write_text(json.dumps(old))
    for stage in ("base_plan", "trained_plan"):
        path = run / "evaluation" / stage / "records.jsonl"
        rows = [of_version_0_1(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert before_after_table(read_results(run / "results.json")) == before
    assert any(row[0] == "malformed images" for row in before.rows)
    assert "malformed images" in write_report(run).read_text()


def test_a_headline_names_a_comparison_that_is_there(tmp_path):
    results = read_results(make_run(tmp_path / "run") / "results.json")
    assert headline_comparison(results) is results["comparisons"][0]
    assert headline_comparison(results | {"comparisons": []}) is None
    assert headline_comparison(results | {"headline": None}) is None


def test_a_column_that_only_some_images_have_is_the_mean_of_those():
    a, b = make_records(0.5, 0, tasks=("colors", "counting")), make_records(0.5, 1, tasks=("colors", "counting"))
    for records, value in ((a, 1.0), (b, 3.0)):
        for number, record in enumerate(records):
            record["measured"] = {"objects": value + number % 2} if record["tag"] == "counting" else {}
    cell = aggregate(a)["objects"]
    assert (cell["mean"], cell["n_images"], cell["n_prompts"]) == (1.5, 20, 10)
    assert compare(a, b)["objects"]["difference"] == 2.0
    b[-1]["measured"] = {}
    assert compare(a, b)["objects"]["n_images"] == 19
    over = compare_over_seeds([(a, a), (a, b), (a, a)])["objects"]
    assert over["n_images"] == 19 and over["difference"] == pytest.approx(2 / 3)
    for record in b:
        record["measured"] = {}
    assert "objects" not in compare(a, b)


def test_a_table_that_a_method_asked_for_is_made_from_the_disk_alone(tmp_path):
    run = make_run(tmp_path / "run")
    results = read_results(run / "results.json")
    results["stages"]["trained_plan"]["metrics"]["seconds"] = {"mean": 1.5, "low": 1.25, "high": 2.0, "n_prompts": 3}
    columns = (Column("seconds", "seconds <a picture>", digits=2), Column("never", "never measured"))
    own = Selection("Costs", "How long.", columns, ["base_plan", "trained_plan"])
    changes = Selection("Changes", "In points.", pairs=[("base_plan", "trained_plan")])
    results["tables"] = [own.written(), changes.written()]
    write_results(run / "results.json", results)
    before_after, costs, changed = run_tables(read_results(run / "results.json"))
    assert costs.rows == [["seconds <a picture>", "-", "1.50 [1.25, 2.00]"]]
    assert [row[0] for row in changed.rows] == [row[0] for row in before_after.rows]
    assert changed.rows[0][1] == before_after.rows[0][-1]
    assert "seconds &lt;a picture&gt;" in write_report(run).read_text()
    del results["tables"][0]["note"]
    with pytest.raises(UserError, match=r"tables\.0: the key 'note' is missing"):
        write_results(run / "results.json", results)


def test_features_are_of_all_images_or_of_none(tmp_path):
    write_features(tmp_path / "features.npy", [np.zeros(3), np.ones(3)])
    assert read_features(tmp_path).shape == (2, 3)
    with pytest.raises(UserError, match="None for some images"):
        write_features(tmp_path / "features.npy", [None, np.ones(3)])
    write_features(tmp_path / "features.npy", [None, None])
    assert read_features(tmp_path) is None


def picture(folder, size: tuple[int, int], name: str = "a picture=1.png") -> tuple:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name, pixels


@pytest.mark.parametrize(
    ("size", "shown"), [((512, 512), (256, 256)), ((1024, 256), (256, 64)), ((256, 256), (256, 256))]
)
def test_a_large_picture_is_shown_small_whatever_it_holds(tmp_path, size, shown):
    path, _ = picture(tmp_path, size)
    address, image = embedded(path)
    assert address.startswith("data:image/jpeg;base64,") and image.size == shown
    assert len(address) < 90_000  # of noise, the worst that JPEG meets


def test_a_small_picture_is_shown_as_it_is(tmp_path):
    path, pixels = picture(tmp_path, (32, 32))
    content = base64.b64decode(embedded(path)[0].removeprefix("data:image/png;base64,"))
    assert content == path.read_bytes() and len(content) < PICTURE.bytes
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)


def test_a_picture_in_a_page_links_to_its_file(tmp_path):
    (tmp_path / "run" / "images").mkdir(parents=True)
    path, _ = picture(tmp_path / "run" / "images", (512, 512))
    html = picture_html(path, tmp_path / "run" / "page", "a <b>")
    assert '<a href="../images/a%20picture%3D1.png">' in html and 'alt="a &lt;b&gt;"' in html and "pixels" not in html
    small, _ = picture(tmp_path, (32, 32), "small.png")
    assert "class=pixels" in picture_html(small, tmp_path, "")


def test_a_page_of_large_pictures_is_small(tmp_path):
    run = make_run(tmp_path / "run", per_task=1)
    for path in (run / "evaluation").rglob("*.png"):
        picture(path.parent, (512, 512), path.name)
    page = write_report(run).read_text()
    shown = page.count("<img")
    assert shown >= 12 and len(page) < 90_000 * shown < path.stat().st_size * shown / 8
