"""What a run leaves behind: files that cannot be misread, tables and pages that say what the numbers say."""

import io
import json
import re

import numpy as np
import pytest
from PIL import ImageFont
from rich.console import Console

from t2i_rl.core.contracts import Column
from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.records import read_job, read_records, read_results, write_records, write_results
from t2i_rl.evaluation.report.curves import chart, group_columns, read_metrics
from t2i_rl.evaluation.report.grid import caption_grid, grid_png, wrap
from t2i_rl.evaluation.report.html import write_report, write_sweep_report
from t2i_rl.evaluation.tables import Table, before_after_table, headline, sweep_tables, with_interval
from tests.support.made_up_run import make_records, make_run

OVERALL = Column("overall", "overall (strict)")


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_round_trip(run, tmp_path):
    records = make_records(0.5, 0)
    write_records(tmp_path / "records.jsonl", records)
    assert read_records(tmp_path / "records.jsonl") == records
    results = read_results(run / "results.json")
    write_results(tmp_path / "again.json", results)
    assert read_results(tmp_path / "again.json") == results
    assert not list(tmp_path.rglob("*.tmp"))


def test_not_a_number_is_refused_and_the_old_file_stays(run):
    results = read_results(run / "results.json")
    before = (run / "results.json").read_text()
    results["stages"]["base_plan"]["metrics"]["overall"]["mean"] = float("nan")
    with pytest.raises(ValueError, match=r"stages\.base_plan\.metrics\.overall\.mean is not finite"):
        write_results(run / "results.json", results)
    assert (run / "results.json").read_text() == before
    with pytest.raises(ValueError, match="score is not finite"):
        write_records(run / "records.jsonl", [{**make_records(0.5, 0)[0], "score": float("inf")}])


def test_errors_name_file_and_key(run):
    path = run / "results.json"
    results = json.loads(path.read_text())
    del results["comparisons"][0]["metrics"]["overall"]["p_value"]
    path.write_text(json.dumps(results))
    with pytest.raises(
        UserError, match=r"results\.json: comparisons\.0\.metrics\.overall: the key 'p_value' is missing"
    ):
        read_results(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"results\.json is not JSON"):
        read_results(path)
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        read_results(run / "nowhere.json")
    (run / "records.jsonl").write_text('{"prompt_id": "a"}\n')
    with pytest.raises(UserError, match=r"records\.jsonl:1: the key 'prompt' is missing"):
        read_records(run / "records.jsonl")


def test_table_in_terminal_and_markdown(run):
    table = before_after_table(read_results(run / "results.json"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    shown = console.export_text()
    markdown = table.markdown()
    for cell in table.rows[0]:
        assert cell in shown and cell in markdown
    narrow = Console(width=78, file=io.StringIO())
    narrow.print(table)
    value, interval = table.rows[0][-1].split(" [")
    shown = narrow.file.getvalue()
    assert value in shown and f"[{interval}" in shown and table.rows[0][-1] not in shown
    assert table.rows[0][0] == "overall (strict)" and table.rows[0][-1].endswith(" *")
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize(
    ("low", "high", "difference", "words"),
    [
        (0.02, 0.1, 0.06, "rose from"),
        (-0.1, -0.02, -0.06, "fell from"),
        (-0.01, 0.1, 0.06, "No measurable change"),
        (None, None, 0.06, "Too few"),
    ],
)
def test_headline_says_what_the_interval_says(run, low, high, difference, words):
    results = read_results(run / "results.json")
    results["comparisons"][0]["metrics"]["overall"] |= {"low": low, "high": high, "difference": difference}
    assert words in headline(results)
    mark = low is not None and low * high > 0
    assert before_after_table(results).rows[0][-1].endswith("*") == mark


def test_only_an_interval_with_a_width_that_leaves_zero_out_is_marked():
    for low, high, marked in ((0.05, 0.15, True), (-0.01, 0.2, False), (0.1, 0.1, False), (None, None, False)):
        cell = {"difference": 0.1, "low": low, "high": high}
        assert with_interval(OVERALL, cell, "difference").endswith("*") == marked


def test_sweep_tables_group_by_seed(tmp_path):
    folders = [
        make_run(tmp_path / f"{reward}_{seed}", seed, reward=reward)
        for reward in ("nsc", "oracle")
        for seed in (0, 1, 2)
    ]
    jobs = [read_job(folder) for folder in folders]
    all_jobs, over_seeds = sweep_tables(jobs)
    assert all_jobs.columns == ["reward", "seed", "base", "trained", "difference"] and len(all_jobs.rows) == 6
    assert [row[:2] for row in over_seeds.rows] == [["nsc", "3"], ["oracle", "3"]]
    mean = np.mean([job.results["comparisons"][0]["metrics"]["overall"]["difference"] for job in jobs[:3]])
    assert over_seeds.rows[0][-1].startswith(f"{100 * mean:+.1f} [")
    assert len(sweep_tables([jobs[0], jobs[3]])) == 1
    with pytest.raises(UserError, match="repeats"):
        sweep_tables([jobs[0], jobs[0], jobs[1]])


def test_two_seeds_are_too_few_for_an_interval_in_every_table_and_on_the_page(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed) for seed in (0, 1)]
    jobs = [read_job(folder) for folder in folders]
    over_seeds = sweep_tables(jobs)[1]
    assert all(cell.endswith("[too few seeds]") for cell in over_seeds.rows[0][2:])
    assert "[too few seeds]" in over_seeds.markdown() and "three seeds or more" in over_seeds.note
    assert "[too few seeds]" in write_sweep_report(tmp_path).read_text()


def test_percentages_over_seeds_stay_within_what_percentages_can_be(tmp_path):
    jobs = []
    for seed, share in enumerate((0.1, 0.5, 0.95)):
        folder = make_run(tmp_path / str(seed), seed)
        results = read_results(folder / "results.json")
        for stage in results["stages"].values():
            stage["metrics"]["overall"]["mean"] = share
        write_results(folder / "results.json", results)
        jobs.append(read_job(folder))
    before = sweep_tables(jobs)[1].rows[0][-3]
    assert before == "51.7 [0.0, 100.0]"


def test_a_sweep_of_evaluations_shows_every_stage_that_was_measured(tmp_path):
    jobs = []
    for seed in (0, 1, 2):
        folder = make_run(tmp_path / str(seed), seed)
        results = read_results(folder / "results.json") | {"comparisons": []}
        results["stages"] = {
            "base_direct": results["stages"]["base_plan"],
            "base_plan": results["stages"]["trained_plan"],
        }
        write_results(folder / "results.json", results)
        jobs.append(read_job(folder))
    all_jobs, over_seeds = sweep_tables(jobs)
    assert all_jobs.columns == ["seed", "base_direct", "base_plan"] and over_seeds.columns[2:] == all_jobs.columns[1:]
    cell = jobs[0].results["stages"]["base_plan"]["metrics"]["overall"]
    assert all_jobs.rows[0][-1] == with_interval(OVERALL, cell, "mean")
    assert over_seeds.rows[0][1] == "3"


def test_a_job_without_a_comparison_shows_what_it_measured_beside_those_with_one(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / str(seed), seed)
    results = read_results(tmp_path / "1" / "results.json") | {"comparisons": []}
    del results["stages"]["trained_plan"]
    write_results(tmp_path / "1" / "results.json", results)
    rows = sweep_tables([read_job(tmp_path / seed) for seed in "01"])[0].rows
    cell = results["stages"]["base_plan"]["metrics"]["overall"]
    assert rows[1] == ["1", with_interval(OVERALL, cell, "mean"), "-", "-"]


def test_a_narrow_terminal_gets_every_number_of_a_wide_table():
    columns = ["", *(f"trained_turn{n} - base_plan" for n in range(8))]
    rows = [["wrong pictures that the turn mends", *(f"{n}1.5 [{n}0.2, {n}2.8] *" for n in range(8))]]
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(Table("Turn against turn", columns, rows, "how to read it"))
    shown = narrow.file.getvalue()
    for n in range(8):
        assert f"{n}1.5" in shown and f"[{n}0.2, {n}2.8] *" in shown and f"trained_turn{n}" in shown
    assert shown.count("- base_plan") == 8 and shown.count("how to read it") == 1
    assert max(map(len, shown.splitlines())) <= 80


def test_overrides_tell_jobs_apart(tmp_path):
    jobs = []
    for rate in ("0.1", "0.2"):
        folder = make_run(tmp_path / rate)
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(f"- method.lr={rate}\n- reward=nsc\n")
        jobs.append(read_job(folder))
    assert sweep_tables(jobs)[0].columns[0] == "method.lr"


def test_report_escapes_every_text_and_takes_no_network(tmp_path):
    attack = "<script>alert('x')</script>"
    run = make_run(tmp_path / "run", prompt=attack, plan=attack, defects=[attack], reward=attack)
    (run / "provenance.json").write_text(json.dumps({"command": attack, "packages": {attack: attack}}))
    (run / "config.yaml").write_text(f"reward: {attack}\n")
    (run / "metrics.csv").write_text(f"step,reward/{attack},train/kl\n0,0.1,\n1,0.2,0.0\n2,0.3,0.1\n")
    text = write_report(run).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r'src=(?!"data:)|href="(?:[a-z]+:|/)|@import|url\(', text)
    assert text.count("<polyline") == 2 and "reward/&lt;script" in text
    assert text.count('<div class="set">') >= 18


@pytest.mark.parametrize(
    ("side", "words"), [("base", "Nothing was trained"), ("trained", "No stage of the base was drawn")]
)
def test_headline_of_one_side_alone_says_which_lacks(run, side, words):
    results = read_results(run / "results.json") | {"comparisons": []}
    results["stages"] = {name: found for name, found in results["stages"].items() if name.startswith(side)}
    assert results["stages"] and words in headline(results)


def test_report_without_training(run):
    results = read_results(run / "results.json") | {"comparisons": []}
    results["stages"] = {name: found for name, found in results["stages"].items() if name.startswith("base")}
    write_results(run / "results.json", results)
    text = write_report(run).read_text()
    assert "Nothing was trained" in text and "No training curves" in text and "Largest gains" not in text


def test_sweep_report(tmp_path):
    for reward in ("nsc", "oracle"):
        make_run(tmp_path / reward, reward=reward, per_task=3)
    text = write_sweep_report(tmp_path).read_text()
    assert "<b>base</b>" in text and "<b>reward=nsc</b>" in text and "<b>reward=oracle</b>" in text
    assert text.count("<img") == 6 * 3 * 3
    write_report(tmp_path / "nsc")
    text = write_sweep_report(tmp_path).read_text()
    links = re.findall(r'<dt><a href="([^"]+)">', text)
    assert links == ["nsc/report.html", "oracle"] and all((tmp_path / link).exists() for link in links)
    with pytest.raises(UserError, match=r"no results\.json"):
        write_sweep_report(tmp_path / "nsc" / "evaluation")


def test_missing_image_is_named(run):
    (run / "evaluation" / "trained_plan" / "images" / "00000.png").unlink()
    with pytest.raises(UserError, match=r"00000\.png does not exist"):
        write_report(run)


def test_metrics_csv_with_holes_and_infinities(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,reward/total,train/kl,odd\n0,0,1.0,,3\n0,1,,0.5,4\n0,2,inf,0.25,5\n0,3,2.0,nan,6\n"
    )
    columns = read_metrics(tmp_path / "metrics.csv")
    assert columns["reward/total"][0].tolist() == [0, 3] and columns["train/kl"][1].tolist() == [0.5, 0.25]
    assert list(group_columns(columns)) == ["Reward", "KL to the reference"]


def test_chart_of_a_constant():
    assert "nan" not in chart("Reward", [("r", np.arange(3.0), np.zeros(3))])


def test_an_axis_of_steps_has_no_half_of_one():
    svg = chart("Reward", [("r", np.array([0.0, 1.0, 2.0]), np.arange(3.0))])
    steps = re.findall(r'text-anchor="middle">([^<]+)<', svg)
    assert steps == ["0", "1", "2"]


def test_a_caption_is_wrapped_by_the_width_of_its_letters():
    font = ImageFont.load_default(size=12)
    text = "WWWWWWWWWWWWWWWWWWWW and iiiiiiiiii, seven"
    lines = wrap(text, 100, font)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_caption_grid():
    images = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = np.asarray(caption_grid(images, ["a", "a longer caption that wraps", ""], columns=2, scale=4))
    for value, count in ((10, 1024), (20, 1024), (30, 1024)):
        assert (grid == value).all(axis=-1).sum() == count
    with pytest.raises(ValueError, match="2 captions"):
        caption_grid(images, ["a", "b"], 2, 4)


def test_grid_png(run, tmp_path):
    grid_png(run, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_of_where_a_run_came_from_only_what_there_is_to_say(run):
    facts = {"command": "python run.py", "git_dirty": False, "sweep": None, "earlier": [], "packages": {"torch": "2"}}
    (run / "provenance.json").write_text(json.dumps(facts))
    text = write_report(run).read_text()
    assert "<dt>git dirty</dt><dd>no</dd>" in text and "<summary>packages</summary>" in text
    assert not any(word in text for word in ("sweep</dt>", "earlier</summary>", "<dd>None</dd>"))


def test_a_table_says_why_a_number_has_no_interval(tmp_path):
    reasons = [
        before_after_table(read_job(make_run(tmp_path / str(count), per_task=count)).results).note for count in (1, 6)
    ]
    assert [note.endswith("No interval: a task has one prompt only.") for note in reasons] == [True, False]
