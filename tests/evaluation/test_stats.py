"""The statistics against independent computation: plain loops, closed forms, simulated coverage."""

import math
import statistics

import numpy as np
import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.diversity import compare_diversity, diversity, mean_cosine_distance, vendi_score
from t2i_rl.evaluation.stats import (
    aggregate,
    bootstrap,
    bracket,
    compare,
    compare_over_seeds,
    compare_values,
    compare_values_over_seeds,
    percentile_interval,
    seed_difference,
    seed_interval,
    t_quantile,
    two_level_interval,
    two_sided_p,
    wilson,
)
from t2i_rl.evaluation.tables import excludes_zero
from t2i_rl.shapes.text import GENEVAL_TASKS
from tests.support.made_up_run import make_records


def width(cell: dict) -> float:
    return cell["high"] - cell["low"]


def test_bootstrap_equals_plain_loops():
    records = make_records(0.5, seed=1, per_task=5, tasks=("colors", "counting"))
    records.pop(3)  # unequal numbers of samples per prompt
    resamples, rng = 50, np.random.default_rng(7)
    draws = np.zeros(resamples)
    for tag in ("colors", "counting"):
        names = sorted({r["prompt_id"] for r in records if r["tag"] == tag})
        for number, picks in enumerate(rng.integers(0, len(names), (resamples, len(names)))):
            images = [float(r["strict"]) for pick in picks for r in records if r["prompt_id"] == names[pick]]
            draws[number] += sum(images) / len(images) / 2
    low, high = np.percentile(draws, 2.5), np.percentile(draws, 97.5)
    cell = aggregate(records, ("counting", "colors"), resamples=resamples, seed=7)["overall"]
    assert cell["low"] == pytest.approx(low, abs=1e-12) and cell["high"] == pytest.approx(high, abs=1e-12)
    assert cell["tasks"] == ["counting", "colors"] and cell["n_prompts"] == 10 and cell["n_images"] == 19


def test_width_equals_the_bernoulli_standard_error():
    n, hits = 400, 120
    values = np.r_[np.ones(hits), np.zeros(n - hits)][None]
    means, draws = bootstrap(values, np.arange(n), np.zeros(n), 20_000, np.random.default_rng(0))
    error = np.sqrt(0.3 * 0.7 / n)
    assert means[0] == pytest.approx(0.3)
    assert draws.std() == pytest.approx(error, rel=0.03)
    interval = percentile_interval(draws[0])
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * error, rel=0.04)


def test_images_of_a_prompt_stay_together():
    """Copies of an image add no information: the interval is that of one image per prompt."""
    rng = np.random.default_rng(0)
    verdicts = (rng.random(60) < 0.5).astype(float)
    single = bootstrap(verdicts[None], np.arange(60), np.zeros(60), 2000, np.random.default_rng(0))[1]
    copies = bootstrap(
        np.repeat(verdicts, 4)[None], np.repeat(np.arange(60), 4), np.zeros(240), 2000, np.random.default_rng(0)
    )[1]
    np.testing.assert_allclose(single, copies, atol=1e-12)


def test_coverage():
    rng, covered, trials = np.random.default_rng(0), 0, 400
    strata, prompts = np.repeat([0, 1], 60), np.repeat(np.arange(60), 2)
    for trial in range(trials):
        chances = np.repeat(np.r_[rng.beta(2, 2, 30), rng.beta(4, 2, 30)], 2)
        values = (rng.random(120) < chances).astype(float)
        draws = bootstrap(values[None], prompts, strata, 400, np.random.default_rng(trial))[1][0]
        low, high = np.percentile(draws, [2.5, 97.5])
        covered += low <= (0.5 + 2 / 3) / 2 <= high
    assert 0.91 <= covered / trials <= 0.98


def test_pairing_narrows_the_interval():
    a, b = make_records(0.4, 1, 40, effect=0.5), make_records(0.6, 2, 40, effect=0.5)
    renamed = [{**record, "prompt_id": record["prompt_id"] + "'"} for record in b]
    unpaired = np.hypot(width(aggregate(a)["overall"]), width(aggregate(renamed)["overall"]))
    paired = compare(a, b)["overall"]
    assert width(paired) < 0.9 * unpaired
    assert paired["difference"] == pytest.approx(aggregate(b)["overall"]["mean"] - aggregate(a)["overall"]["mean"])
    assert paired["low"] > 0 and paired["p_value"] == pytest.approx(2 / 2001)


def test_order_of_records_does_not_matter():
    a, b = make_records(0.4, 1), make_records(0.6, 2)
    assert compare(a, b) == compare(a[::-1], b)
    same = compare(a, a)["overall"]
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)


def test_p_value_agrees_with_the_interval():
    draws = np.random.default_rng(0).normal(1.96, 1, 100_000)
    assert two_sided_p(draws) == pytest.approx(0.05, abs=0.003)


@pytest.mark.parametrize("damage", ["missing", "repeated"])
def test_unmatched_keys_are_refused(damage):
    a, b = make_records(0.5, 1), make_records(0.5, 2)
    b = b[1:] if damage == "missing" else [*b, b[0]]
    with pytest.raises(UserError, match="cannot pair"):
        compare(a, b)


def test_every_metric_is_what_it_says():
    records = make_records(0.5, 3, tasks=(*GENEVAL_TASKS, "texture"))
    metrics = aggregate(records, GENEVAL_TASKS)

    def mean_of_tasks(name, keep=lambda record: True, tasks=GENEVAL_TASKS):
        return np.mean([np.mean([float(r[name]) for r in records if r["tag"] == tag and keep(r)]) for tag in tasks])

    assert metrics["overall"]["mean"] == pytest.approx(mean_of_tasks("strict"))
    assert metrics["overall"]["tasks"] == list(GENEVAL_TASKS)
    assert metrics["lenient"]["mean"] == pytest.approx(mean_of_tasks("lenient"))
    assert metrics["score"]["mean"] == pytest.approx(mean_of_tasks("score"))
    assert metrics["held_out"]["mean"] == pytest.approx(mean_of_tasks("strict", lambda r: not r["seen"]))
    assert metrics["seen"]["n_prompts"] == 30 and metrics["overall"]["n_images"] == 120
    assert metrics["task/texture"]["mean"] == pytest.approx(mean_of_tasks("strict", tasks=("texture",)))
    assert metrics["plan_length"]["mean"] == pytest.approx(np.mean([r["plan_length"] for r in records]))
    assert metrics["malformed"]["mean"] == pytest.approx(np.mean(["malformed shape" in r["defects"] for r in records]))


def test_what_is_absent_is_left_out():
    records = [{**r, "seen": None, "plan_length": None} for r in make_records(0.5, 3, tasks=("texture",))]
    assert set(aggregate(records, GENEVAL_TASKS)) == {"task/texture", "malformed"}
    with pytest.raises(UserError, match="no records"):
        aggregate([])


def test_one_prompt_has_no_interval():
    cell = aggregate(make_records(0.5, 0, per_task=1))["overall"]
    assert cell["low"] is None and cell["high"] is None


def test_t_quantile_against_tables():
    for degrees, value in {1: 12.7062, 2: 4.30265, 4: 2.77645, 9: 2.26216, 100: 1.98397}.items():
        assert t_quantile(degrees) == pytest.approx(value, abs=2e-4)


def test_seed_interval():
    cell = seed_interval([0.1, 0.2, 0.3])
    assert cell["mean"] == pytest.approx(0.2) and cell["high"] - 0.2 == pytest.approx(4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert seed_interval([0.1]) == {"mean": 0.1, "low": None, "high": None, "no_interval": "too few seeds", "n": 1}


@pytest.mark.parametrize("values", [[0.3, 0.3], [0.3, 0.5]])
def test_two_seeds_have_no_interval(values):
    cell = seed_interval(values)
    assert cell["mean"] == pytest.approx(np.mean(values)) and cell["low"] is cell["high"] is None
    assert bracket(cell) == "[too few seeds]"


def test_seeds_that_all_agree_have_no_interval_whatever_their_rounding():
    for values in ([0.0] * 3, [0.7] * 5, [0.1 + 0.2, 0.3, 0.3]):
        assert bracket(seed_interval(values)) == "[seeds agree]"
    assert seed_interval([0.3, 0.3, 0.3001])["low"] is not None


def test_intervals_over_seeds_are_students_by_an_independent_computation():
    rng = np.random.default_rng(0)
    for n, quantile in ((3, 4.302652730), (4, 3.182446305), (9, 2.306004135)):  # of printed tables
        values = rng.normal(0.5, 0.01, n).tolist()
        mean, half = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(n)
        cell = seed_interval(values)
        assert (cell["low"], cell["high"]) == pytest.approx((mean - half, mean + half), abs=1e-7)
        assert seed_interval(values, (0.0, 1.0)) == seed_interval(values)  # within the limits nothing changes


def test_an_interval_of_shares_ends_where_shares_do_and_holds_the_truth_as_often():
    """Cut at 0 and 1 it holds every possible truth exactly where the whole interval does."""
    rng, truth = np.random.default_rng(1), np.linspace(0, 1, 101)
    for _ in range(50):
        values = rng.beta(0.5, 0.5, 3)
        whole, cut = seed_interval(values), seed_interval(values, (0.0, 1.0))
        assert 0 <= cut["low"] <= cut["mean"] <= cut["high"] <= 1
        held = [(cell["low"] <= truth) & (truth <= cell["high"]) for cell in (whole, cut)]
        assert (held[0] == held[1]).all()
    assert seed_interval([0.9, 1.0, 0.2], (0.0, 1.0))["high"] == 1.0


def test_two_runs_have_no_two_level_interval():
    pairs = [(make_records(0.5, 0, 20), make_records(0.7, seed, 20)) for seed in (1, 2)]
    cell = compare_over_seeds(pairs)["overall"]
    assert cell["low"] is cell["high"] is cell["p_value"] is None and cell["no_interval"] == "too few seeds"


def test_a_difference_that_is_one_number_but_for_rounding_excludes_nothing():
    assert not excludes_zero({"low": 0.1 + 0.2, "high": 0.3})
    assert excludes_zero({"low": 0.3, "high": 0.4})


def test_two_levels_are_wider_than_prompts_alone():
    pairs = [
        (make_records(0.5, 0, 20), make_records(rate, seed, 20)) for seed, rate in enumerate((0.5, 0.7, 0.9), start=1)
    ]
    both = compare_over_seeds(pairs)["overall"]
    within = [compare(*pair)["overall"] for pair in pairs]
    assert both["difference"] == pytest.approx(np.mean([cell["difference"] for cell in within]))
    assert width(both) > max(width(cell) for cell in within)
    assert both["n_seeds"] == 3
    assert compare_over_seeds(pairs[:1])["overall"]["low"] is None
    with pytest.raises(UserError, match="same images"):
        compare_over_seeds([pairs[0], (pairs[1][0][:40], pairs[1][1][:40])])


def test_the_two_level_bootstrap_equals_plain_loops():
    """Seeds are drawn first, then the prompts of each task, and one draw of prompts serves all seeds."""
    pairs = [
        (
            make_records(0.5, 0, 5, tasks=("colors", "counting")),
            make_records(rate, seed, 5, tasks=("colors", "counting")),
        )
        for seed, rate in enumerate((0.4, 0.6, 0.9), start=1)
    ]
    resamples = 40
    picks = np.random.default_rng(7).integers(0, 3, (resamples, 3))
    rng, of_tasks = np.random.default_rng(8), {}
    for tag in ("colors", "counting"):
        names = sorted({row["prompt_id"] for row in pairs[0][0] if row["tag"] == tag})
        of_tasks[tag] = [[names[pick] for pick in row] for row in rng.integers(0, len(names), (resamples, len(names)))]
    draws = np.zeros(resamples)
    for number in range(resamples):
        for pick in picks[number]:
            before, after = ({(row["prompt_id"], row["sample_index"]): row for row in side} for side in pairs[pick])
            for names in (of_tasks[tag][number] for tag in of_tasks):
                changes = [float(after[n, i]["strict"]) - float(before[n, i]["strict"]) for n in names for i in (0, 1)]
                draws[number] += sum(changes) / len(changes) / 2 / 3
    cell = compare_over_seeds(pairs, resamples=resamples, seed=7)["overall"]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert (cell["low"], cell["high"]) == pytest.approx((low, high), abs=1e-12)


def test_changes_of_any_figure_are_compared_as_records_are():
    tasks = ("colors", "counting", "position")
    a, b = make_records(0.4, 1, 8, tasks=tasks), make_records(0.6, 2, 8, tasks=tasks)
    changes = np.array([float(after["strict"]) - float(before["strict"]) for before, after in zip(a, b, strict=True)])
    prompts, tags = np.array([row["prompt_id"] for row in a]), np.array([row["tag"] for row in a])
    wanted = compare(a, b)["overall"]
    assert compare_values(changes, prompts, tags) == {name: wanted[name] for name in wanted if name != "tasks"}


@pytest.mark.parametrize("strata", [None, np.repeat([0, 1], 12)], ids=["one lot", "by task"])
def test_changes_over_seeds_equal_plain_loops(strata):
    rng, resamples = np.random.default_rng(3), 30
    changes, prompts = rng.normal(size=(3, 24)), np.repeat(np.arange(12), 2)
    generator, lots = np.random.default_rng(5), [range(12)] if strata is None else [range(6), range(6, 12)]
    drawn = [generator.integers(0, len(lot), (resamples, len(lot))) + lot[0] for lot in lots]
    picks, draws = generator.integers(0, 3, (resamples, 3)), np.zeros(resamples)
    for number in range(resamples):
        for seed in picks[number]:
            for lot in drawn:
                values = [changes[seed, 2 * prompt + sample] for prompt in lot[number] for sample in (0, 1)]
                draws[number] += sum(values) / len(values) / len(lots) / 3
    cell = compare_values_over_seeds(changes, prompts, strata, resamples, seed=5)
    assert (cell["low"], cell["high"]) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=1e-12)
    assert cell["difference"] == pytest.approx(changes.mean(), abs=1e-12) and cell["n_prompts"] == 12


def test_tasks_that_differ_widen_the_interval_of_one_lot_and_not_that_by_task():
    rng = np.random.default_rng(0)
    tags, prompts = np.repeat([0, 1], 100), np.arange(200)
    changes = rng.normal(size=(3, 200)) + np.where(tags, 5.0, -5.0)
    one_lot, by_task = (compare_values_over_seeds(changes, prompts, strata) for strata in (None, tags))
    assert width(one_lot) > 3 * width(by_task)
    assert one_lot["difference"] == pytest.approx(by_task["difference"])


def test_changes_that_cancel_over_seeds_make_zero_and_not_nearly_zero():
    changes = 100.0 * np.array([[-1, -1, -1], [1, 0, 0], [1, 0, 1]])
    assert changes.mean(axis=1).mean() != 0  # but for rounding it is
    assert compare_values_over_seeds(changes, np.arange(3))["difference"] == 0


def test_two_rows_of_draws_have_no_two_level_interval():
    draws = np.random.default_rng(0).normal(size=(2, 50))
    interval = two_level_interval(draws, np.random.default_rng(0))
    assert interval == {"low": None, "high": None, "no_interval": "too few seeds", "p_value": None}


def test_the_interval_of_a_difference_per_seed_is_students():
    values = [0.1, 0.4, 0.2]
    assert seed_difference(values) == {"difference": pytest.approx(0.7 / 3), **seed_interval(values)}


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (120, 400), (400, 400)])
def test_wilsons_interval_ends_where_the_share_is_1_96_of_its_own_errors_away(hits, n):
    cell, z = wilson(hits, n), 1.959964
    roots = np.sort(np.roots([1 + z**2 / n, -(2 * hits / n + z**2 / n), (hits / n) ** 2]).real)
    assert (cell["low"], cell["high"]) == pytest.approx(tuple(roots), abs=1e-9) and cell["mean"] == hits / n


def test_equal_runs_have_the_interval_of_one():
    """Without spread between seeds, the two-level bootstrap is the bootstrap over prompts."""
    a, b = make_records(0.4, 1, 30), make_records(0.6, 2, 30)
    two_level, one_level = compare_over_seeds([(a, b)] * 3)["overall"], compare(a, b)["overall"]
    assert width(two_level) == pytest.approx(width(one_level), rel=0.05)


def test_diversity_in_closed_form():
    identical, orthogonal = np.ones((4, 6)) / 6**0.5, np.eye(4, 6)
    assert vendi_score(identical) == pytest.approx(1) and vendi_score(orthogonal) == pytest.approx(4)
    assert mean_cosine_distance(identical) == pytest.approx(0) and mean_cosine_distance(orthogonal) == pytest.approx(1)
    features = np.concatenate([identical, 3 * orthogonal]).astype(np.float32)
    table = diversity(features, ["a"] * 4 + ["b"] * 4)
    assert table["diversity"]["mean"] == pytest.approx(0.5, abs=1e-6)
    assert table["vendi"]["mean"] == pytest.approx(2.5, abs=1e-5)
    assert table["vendi"]["low"] == pytest.approx(1, abs=1e-5) and table["vendi"]["n_prompts"] == 2


def test_two_images_have_a_vendi_score_in_closed_form():
    cosine = 0.3
    p = np.array([1 + cosine, 1 - cosine]) / 2
    pair = np.array([[1, 0], [cosine, np.sqrt(1 - cosine**2)]])
    assert vendi_score(pair) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_diversity_is_compared_prompt_by_prompt_and_refuses_single_samples():
    rng, prompts = np.random.default_rng(0), np.repeat(np.arange(20), 3).astype(str)
    features = rng.normal(size=(60, 8))
    collapsed = features.reshape(20, 3, 8).mean(axis=1, keepdims=True).repeat(3, axis=1).reshape(60, 8)
    change = compare_diversity(features, collapsed, prompts)["diversity"]
    assert change["high"] < 0
    assert change["difference"] == pytest.approx(-diversity(features, prompts)["diversity"]["mean"])
    with pytest.raises(UserError, match="2 or more samples"):
        diversity(features[:4], ["a", "a", "a", "b"])
    with pytest.raises(ValueError, match="zero or not finite"):
        diversity(np.zeros((2, 3)), ["a", "a"])
