"""The classes that README.md and docs/adding.md add work wherever one of their kind is taken.

Their kinds are method, model, benchmark and reward.
"""

import json
import sys

import lightning as L
import numpy as np
import pytest
import torch

from t2i_rl.evaluation.drawer import Drawer
from t2i_rl.evaluation.report.html import write_sweep_report
from t2i_rl.evaluation.stages import Stages
from t2i_rl.methods.irg.evaluation import TurnsDrawer
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.irg.watch import WatchTurns
from t2i_rl.models.autoregressive.interleaved import InterleavedJanus
from tests.support.commands import call
from tests.support.small_rewards import save_small_hps
from tests.support.tiny import load_tiny_janus, save_tiny_janus
from tests.test_readme import ADDING, README, write_files

CONFIGS = ["--config-dir", "my_conf"]
SHAPES_WORDS = ("malformed", "over_counted", "under_counted", "counting")
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every file that the two pages show, importable while this module runs."""
    folder = tmp_path_factory.mktemp("own")
    write_files(README.split("<!-- example:begin -->")[1].split("<!-- example:end -->")[0], folder)
    write_files(ADDING, folder)
    modules = [path.stem for path in folder.glob("*.py")]
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in that folder; returns its results.json and what it printed."""

    def command(name: str, *arguments: str) -> tuple[dict, str]:
        code = call(monkeypatch, folder, *CONFIGS, *arguments, f"hydra.run.dir={name}", "trainer.accelerator=cpu")
        printed = capsys.readouterr()
        assert code == 0, printed.err[-3000:]
        return json.loads((folder / name / "results.json").read_text()), printed.out

    return command


def refused(folder, monkeypatch, capsys, *arguments: str) -> str:
    code = call(monkeypatch, folder, *CONFIGS, *arguments, "hydra.run.dir=refused", "trainer.accelerator=cpu")
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1, said
    return said[0]


def metrics_of(results: dict) -> set[str]:
    return {name for stage in results["stages"].values() for name in stage["metrics"]}


def test_an_evaluation_speaks_of_what_the_benchmark_measures_and_of_nothing_else(folder, run):
    results, printed = run(
        "evaluated", "task=evaluate", "model=blind", "benchmark=color_only", "evaluation.stages=[base_direct]"
    )
    assert metrics_of(results) == {"overall", "task/color", "lenient", "score"}
    assert results["columns"] == {} and results["tables"] == [] and results["headline"] is None
    page = (folder / "evaluated" / "report.html").read_text()
    said = printed + page.split("<h2>Settings")[0].split("<h2>Before")[1]
    assert "no blue" in said and not any(word in said for word in SHAPES_WORDS)
    assert not list((folder / "evaluated").rglob("features.npy"))
    records = (folder / "evaluated" / "evaluation" / "base_direct" / "records.jsonl").read_text().splitlines()
    wrong = next(record for record in map(json.loads, records) if not record["strict"])
    assert wrong["defect_kinds"] == ["missing"] and wrong["measured"] == {}


def test_a_metric_that_this_benchmark_does_not_measure_is_refused_with_those_that_it_does(folder, monkeypatch, capsys):
    evaluation = ["task=evaluate", "model=blind", "benchmark=color_only", "evaluation.stages=[base_direct]"]
    for metric in ("malformed", "diversity"):
        said = refused(folder, monkeypatch, capsys, *evaluation, f"optimized_metric={metric}")
        assert said.endswith("choose from headline, overall, task/color, lenient, score")


def test_training_by_an_own_method_and_an_own_reward_judged_by_an_own_benchmark(folder, run):
    results, printed = run(
        "trained",
        *("method=best_of_group", "method.group_size=2", "reward=distinct_codes", "trainer.max_steps=1"),
        *("data.batch_size=2", "benchmark=color_only", "benchmark.samples_per_prompt=1"),
        *("+reward@watch.distinct=distinct_codes", "evaluation.stages=[trained_direct]", "callbacks=none"),
    )
    assert results["steps"] == 1 and metrics_of(results) == {"overall", "task/color", "lenient", "score"}
    header = (folder / "trained" / "metrics.csv").read_text().splitlines()[0]
    assert "watch/distinct" in header
    assert "malformed" not in printed


def test_validation_by_an_own_benchmark_while_an_own_pair_method_trains(folder, run):
    results, _ = run(
        "validated",
        *(
            "method=pseudo_huber",
            "model=sd_tiny",
            "benchmark=color_only",
            "trainer.max_steps=1",
            "evaluation.stages=[]",
        ),
        *("data.batch_size=2", "callbacks.validation.benchmark=${benchmark}", "model.steps=2"),
    )
    assert results["steps"] == 1
    header = (folder / "validated" / "metrics.csv").read_text().splitlines()[0].split(",")
    measured = {name for name in header if name.startswith("val/")}
    assert measured == {"val/overall", "val/score", "val/color"}


def test_a_frechet_distance_without_references_and_a_best_that_is_not_measured_are_refused(folder, monkeypatch, capsys):
    validated = ["method=pseudo_huber", "model=sd_tiny", "evaluation.stages=[]", "~callbacks.validation.benchmark"]
    validated += ["+callbacks.validation.benchmark={_target_: my_benchmarks.ColorOnly}"]
    said = refused(folder, monkeypatch, capsys, *validated, "callbacks.validation.fid=true")
    assert "callbacks.validation.fid=true compares with reference_features(), and ColorOnly has none" in said
    said = refused(folder, monkeypatch, capsys, *validated, "callbacks.validation.best=val/fid")
    assert "choose from val/overall, val/score, val/color, or null" in said


def test_a_search_over_noise_is_judged_where_the_benchmark_can_and_says_where_it_cannot(folder, run):
    search = ["method=noise_opt", "benchmark=color_only", "model=flux_tiny", "method.iterations=1"]
    results, printed = run("unjudged", *search, "data.prompts_per_task=1")
    assert results["headline"]["metric"] == "target" and "overall" not in metrics_of(results)
    assert "benchmark=color_only cannot judge these prompts at this size" in printed
    clauses = {"include": [{"class": "circle", "count": 1, "color": "red"}]}  # which the reward reads
    row = {"prompt": "a red circle", "tag": "color", "color": "red", **clauses}
    (folder / "reds.jsonl").write_text(json.dumps(row) + "\n")
    results, printed = run("judged", *search, "data=prompts", "data.path=reds.jsonl", "method.samples=2")
    assert results["headline"]["metric"] == "overall" and "task/color" in metrics_of(results)
    assert results["benchmark"]["share"] == 0.03 and not metrics_of(results) & {"diversity", *SHAPES_WORDS}
    assert "Before and after" in (folder / "judged" / "report.html").read_text() and "malformed" not in printed


def test_a_method_that_judges_pictures_alone_refuses_to_watch_rewards_that_read_tokens(folder, monkeypatch, capsys):
    for reward, kind in (("nsc", "SelfCertainty"), ("distinct_codes", "DistinctCodes")):
        said = refused(folder, monkeypatch, capsys, "method=irg_grpo", "reward=oracle", f"+reward@watch.mine={reward}")
        assert f"watch.mine ({kind}) reads more than" in said and "~watch.mine" in said


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory):
    return InterleavedJanus(load_tiny_janus(save_tiny_janus(tmp_path_factory.mktemp("janus"))))


class Turns(L.LightningModule):
    """What draws in turns, as its evaluation and its callback see it."""

    def __init__(self, interleaved):
        super().__init__()
        self.interleaved, self.judge = interleaved, None
        self.interleave = Rounds(rounds=2, max_tokens=4, retries=0, stop="stop.")
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def averaged(self):
        return torch.no_grad()

    def training_step(self, batch, index):
        return self.weight.square()

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1))


def test_turns_are_judged_by_a_benchmark_that_has_no_words_for_reflections(folder, interleaved, tmp_path):
    from my_benchmarks import ColorOnly

    drawer = TurnsDrawer(interleaved.adapter, Turns(interleaved))
    stages = Stages(L.Trainer(accelerator="cpu", **QUIET), drawer, ColorOnly(samples_per_prompt=1), tmp_path, 0, 8)
    stages.draw("base_turns")
    summary = stages.summary()
    second = summary["stages"]["base_turn2"]["metrics"]
    assert {"overall", "text_tokens", "unfinished"} <= set(second) and not {"flags", "names_defect"} & set(second)
    assert [table["title"] for table in summary["tables"]] == ["What each turn did", "Turn against turn"]


def test_turns_are_watched_by_a_benchmark_that_has_no_words_for_reflections(folder, interleaved, tmp_path):
    from my_benchmarks import ColorOnly

    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="", version="")
    watch = WatchTurns(str(tmp_path), ColorOnly(), every_n_steps=1)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=[watch], **{**QUIET, "logger": logger})
    trainer.fit(Turns(interleaved))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "val/turn2" in header and "val/unfinished" in header and "val/flags" not in header
    assert (tmp_path / "samples" / "step_000001.png").is_file()


def test_a_sweep_of_own_parts_has_its_page(folder, run, tmp_path):
    for seed in (0, 1):
        run(
            f"sweep/{seed}",
            "task=evaluate",
            "model=blind",
            "benchmark=color_only",
            f"seed={seed}",
            "evaluation.stages=[base_direct]",
        )
    text = write_sweep_report(folder / "sweep").read_text()
    assert "color_only" in text and "All jobs: overall (strict)" in text and "malformed" not in text


def test_the_benchmark_whose_judge_is_a_model_measures_its_own_column(folder, run, tmp_path):
    clip = save_small_hps(tmp_path / "clip")
    results, printed = run(
        "matched",
        "task=evaluate",
        "model=blind",
        "benchmark=clip_match",
        f"benchmark.path={clip}",
        "evaluation.stages=[base_direct]",
        "optimized_metric=cosine",
    )
    metrics = results["stages"]["base_direct"]["metrics"]
    assert -1 <= metrics["cosine"]["mean"] <= 1 and {"diversity", "vendi"} <= set(metrics)
    assert results["columns"]["cosine"]["label"] == "cosine with its text"
    assert "cosine with its text" in printed
    records = (folder / "matched" / "evaluation" / "base_direct" / "records.jsonl").read_text().splitlines()
    cosines = [json.loads(record)["measured"]["cosine"] for record in records]
    assert np.mean(cosines) == pytest.approx(metrics["cosine"]["mean"])


def test_a_method_that_draws_a_picture_a_prompt_needs_no_drawer_of_its_own(folder):
    from my_methods import BestOfGroup
    from my_pair_methods import PseudoHuber

    assert BestOfGroup.drawer is PseudoHuber.drawer is Drawer
