"""What a reward, a benchmark and a data module of a user's own must give is asked in one line that
names the class."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from t2i_rl.benchmarks.shapes import Shapes
from t2i_rl.core.contract_checks import (
    check_benchmark,
    check_reward,
    checked,
    features_of,
    measured_of,
    verdicts_of,
)
from t2i_rl.core.contracts import Benchmark, Column, Reward, RewardOutput, Verdict
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.data.base import Data, check_data
from t2i_rl.data.prompts import PromptData
from t2i_rl.rewards.length import Length
from t2i_rl.rewards.none import NoReward
from t2i_rl.rewards.oracle import Oracle
from t2i_rl.rewards.random import Random
from t2i_rl.rewards.self_certainty import SelfCertainty
from t2i_rl.rewards.weighted_sum import WeightedSum
from t2i_rl.tasks.examine import check_method
from t2i_rl.tasks.optimize_noise import judging
from tests.support.commands import composed

ROWS, FINE = 3, torch.zeros(3)


@pytest.mark.parametrize(
    ("output", "named"),
    [
        (FINE, "must return a RewardOutput"),
        (None, "must return a RewardOutput.*NoneType"),
        (RewardOutput([0.0, 0.0, 0.0]), "total must be a tensor of 3 numbers, one a row, not a list"),
        (RewardOutput(torch.zeros(3, 1)), r"total has shape \(3, 1\), expected \(3,\)"),
        (RewardOutput(torch.tensor(0.0)), r"total has shape \(\)"),
        (RewardOutput(torch.zeros(2)), r"total has shape \(2,\)"),
        (RewardOutput(torch.zeros(3, dtype=torch.complex64)), "total must be real numbers, not complex64"),
        (RewardOutput(torch.tensor([0.0, float("nan"), 1.0])), r"not finite in 1 of 3 rows \(first: row 1, nan\)"),
        (RewardOutput(torch.tensor([0.0, 1e300, 1.0], dtype=torch.float64)), "not finite in 1 of 3 rows"),
        (RewardOutput(FINE, {"part": torch.full((3,), float("inf"))}), "part is not finite in 3 of 3 rows"),
        (RewardOutput(FINE, {"part": 0.5}), "part must be a tensor"),
        (RewardOutput(FINE, [FINE]), "parts must be tensors by name"),
        (RewardOutput(torch.tensor([float("nan")] * 3), {"total": FINE}), "cannot be called 'total'"),
    ],
)
def test_a_reward_that_gives_anything_but_a_finite_number_a_row_is_refused_by_name(output, named):
    with pytest.raises(UserError, match=f"reward Mine.*{named}") as error:
        checked(output, ROWS, "Mine")
    assert "\n" not in str(error.value)


def test_whole_numbers_and_gradients_are_taken_and_no_gradient_goes_on():
    output = checked(RewardOutput(torch.tensor([1, 2, 3]), {"a": torch.ones(3, requires_grad=True) * 2}), ROWS, "Mine")
    assert output.total.tolist() == [1, 2, 3] and not output.parts["a"].requires_grad


class Mine(Reward):
    def __call__(self, rollout):
        return RewardOutput(torch.zeros(len(rollout)))


def mine(**attributes):
    return type("Mine", (Mine,), attributes)()


@pytest.mark.parametrize(
    ("reward", "named"),
    [
        (type("Bare", (), {"__call__": lambda self, drawn: None})(), "must derive from t2i_rl.Reward"),
        (type("Bare", (Reward,), {})(), r"must have __call__\(drawn\)"),
        (mine(reads=dict), "reads = Drawn, or a class derived from it"),
        (mine(needs_images="yes"), "needs_images = True or False.*not 'yes'"),
        (mine(distribution="mine"), "distribution = None, or 'conditional' or 'guided'"),
        (mine(__call__=lambda self: None), r"must have __call__\(drawn\)"),
        (mine(needs_meta="include"), "needs_meta as several names"),
        (mine(image_sizes=32), "image_sizes as whole numbers of pixels"),
        (mine(needs_plans=1), "needs_plans = True or False"),
        (mine(differentiable=True), r"must have score_pixels\(pixels, prompts\)"),
        (mine(refuses=lambda self: None), r"refuses\(prompt\)"),
    ],
)
def test_a_reward_that_does_not_say_what_it_reads_is_refused_by_name(reward, named):
    with pytest.raises(UserError, match=rf"reward \({type(reward).__name__}\).*{named}"):
        check_reward(reward, "reward")
    with pytest.raises(UserError, match=rf"reward.parts.a \({type(reward).__name__}\)"):
        WeightedSum({"a": reward}, {"a": 1.0})


def test_rewards_that_are_shipped_say_it():
    for reward in (Oracle(), Random(), Length(), SelfCertainty(), NoReward(), WeightedSum({"a": Random()}, {"a": 1.0})):
        check_reward(reward, "reward")


class Silent:
    """Derives from nothing."""


@pytest.mark.parametrize("arguments", [("method=irg_grpo",), ("method=noise_search",)])
@pytest.mark.parametrize("key", ["reward", "watch.oracle"])
def test_what_is_known_of_the_class_is_asked_before_anything_is_made(arguments, key):
    cfg = composed(*arguments, "trainer.accelerator=cpu")
    node = cfg.reward if key == "reward" else cfg.watch.oracle
    node._target_ = f"{__name__}.Silent"
    with pytest.raises(UserError, match="Silent must derive from t2i_rl.Reward"):
        check_method(cfg, training=True)


@pytest.mark.parametrize("arguments", [("method=irg_grpo",), ("method=noise_search",)])
def test_a_watched_reward_of_tokens_is_refused_where_pictures_alone_are_judged(arguments):
    with pytest.raises(UserError, match="watch.nsc"):
        check_method(composed(*arguments, "+reward@watch.nsc=nsc", "trainer.accelerator=cpu"), training=True)


class Board(Benchmark):
    """A benchmark of a user's own that has all it needs."""

    name, version, overall_tasks, samples_per_prompt = "board", 1, ("color",), 2

    def prompts(self):
        return [Prompt("a", "a red circle", "color", {})]

    def judge(self, images, prompts):
        return [Verdict(True, True, 1.0, []) for _ in prompts]

    def features(self, images):
        return images.reshape(len(images), -1).astype(np.float32)

    def fingerprint(self):
        return {"name": self.name}


def board(**attributes):
    return type("Board", (Board,), attributes)()


@pytest.mark.parametrize(
    ("benchmark", "named"),
    [
        (board(prompts=None), r"must have prompts\(\)"),
        (board(prompts=lambda self: []), "a list of one Prompt or more"),
        (
            board(prompts=lambda self: ["a red circle"]),
            r"prompts\(\)\[0\] must be a t2i_rl.Prompt, not a str",
        ),
        (board(judge=lambda self, images: []), r"must have judge\(images, prompts\)"),
        (board(features=None), r"must have features\(images\)"),
        (board(fingerprint=lambda self: {"a": object()}), "plain values"),
        (board(fingerprint=lambda self: None), "plain values"),
        (board(name=None), "must have a name"),
        (board(samples_per_prompt=0), "samples_per_prompt must be a whole number of 1 or more"),
        (board(overall_tasks="color"), "overall_tasks as several names"),
        (board(overall_tasks=("shape",)), "the tags of its prompts"),
        (board(image_sizes="32"), "image_sizes"),
    ],
)
def test_a_benchmark_that_lacks_something_is_refused_by_name(benchmark, named):
    check_benchmark(Board())
    check_benchmark(Shapes(prompts_per_task=1))
    with pytest.raises(UserError, match=rf"benchmark \(Board\).*{named}"):
        check_benchmark(benchmark)


IMAGES, PROMPTS = np.zeros((2, 4, 4, 3), np.uint8), [Prompt("a", "a", "color", {}), Prompt("b", "b", "color", {})]


@pytest.mark.parametrize(
    ("verdicts", "named"),
    [
        ([Verdict(True, True, 1.0, [])], "2 verdicts, one a picture, not 1 of them"),
        (None, "not nothing"),
        ([True, False], "each a t2i_rl.Verdict, not a bool"),
        ([Verdict(np.bool_(True), True, 1.0, [])] * 2, "strict and lenient as True or False"),
        ([Verdict(True, True, float("nan"), [])] * 2, "a score from 0 to 1, not nan"),
        ([Verdict(True, True, 1.0, "missing")] * 2, "defects as a list of t2i_rl.Defect"),
    ],
)
def test_what_a_judge_gives_is_a_verdict_a_picture(verdicts, named):
    assert len(verdicts_of(Board(), IMAGES, PROMPTS)) == 2
    with pytest.raises(UserError, match=f"Board.judge must give.*{named}"):
        verdicts_of(board(judge=lambda self, images, prompts: verdicts), IMAGES, PROMPTS)


@pytest.mark.parametrize("features", [np.zeros(2), np.zeros((1, 3)), np.full((2, 3), np.nan), np.array([["a"]] * 2)])
def test_features_are_a_row_of_finite_numbers_a_picture_or_none_at_all(features):
    assert features_of(Board(), IMAGES).shape == (2, 48)
    assert features_of(board(features=lambda self, images: None), IMAGES) is None
    with pytest.raises(UserError, match="Board.features must give"):
        features_of(board(features=lambda self, images: features), IMAGES)


DARK, COUNTED = Column("dark", "dark pictures"), Column("counted", tasks=("counting",))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (("dark",), r"several t2i_rl.Column, like \(Column"),
        (Column("dark"), "several t2i_rl.Column"),
        ((DARK, Column("dark")), "'dark' is none"),
        ((Column("overall"),), "'overall' is none"),
        ((Column("task/color"),), "'task/color' is none"),
        ((Column("dark", tasks="color"),), "tasks of its column dark as several names"),
    ],
)
def test_columns_have_names_of_their_own(columns, named):
    check_benchmark(board(columns=(DARK, COUNTED)))
    with pytest.raises(UserError, match=f"Board.*{named}"):
        check_benchmark(board(columns=columns))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"light": 1.0}, r"a dict by the names of its columns \(dark, counted\)"),
        ([1.0], "a dict by the names"),
        ({"dark": float("nan")}, "finite numbers: dark is nan"),
        ({"dark": "yes"}, "finite numbers: dark is 'yes'"),
    ],
)
def test_what_is_measured_is_a_number_by_the_name_of_a_column_on_its_tasks(values, named):
    verdict, both = Verdict(True, True, 1.0), {"dark": True, "counted": 2}
    mine = board(columns=(DARK, COUNTED), measured=lambda self, prompt, verdict: both)
    assert measured_of(mine, PROMPTS[0], verdict) == {"dark": 1.0}  # a prompt of another task than counting
    assert measured_of(mine, replace(PROMPTS[0], tag="counting"), verdict) == {"dark": 1.0, "counted": 2.0}
    broken = board(columns=(DARK, COUNTED), measured=lambda self, prompt, verdict: values)
    with pytest.raises(UserError, match=f"Board.measured must give {named}"):
        measured_of(broken, PROMPTS[0], verdict)


class Endless(Data):
    def train_dataloader(self):
        return None


def test_a_data_module_that_lacks_something_is_refused_by_name():
    check_data(PromptData(batch_size=1, prompts=PROMPTS))
    for kind, given, named in (
        (SimpleNamespace, {}, "must derive from t2i_rl.Data"),
        (Data, {"prompts": PROMPTS}, r"must have train_dataloader\(\)"),
        (Endless, {"batch_size": 0, "prompts": PROMPTS}, "batch_size must be a whole number of 1 or more, not 0"),
        (Endless, {}, "prompts must be a list of one Prompt or more, not a tuple"),
        (Endless, {"prompts": ["a"]}, r"prompts\[0\] must be a t2i_rl.Prompt"),
    ):
        data = kind()
        for name, value in given.items():
            setattr(data, name, value)
        with pytest.raises(UserError, match=rf"data \({kind.__name__}\).*{named}"):
            check_data(data)


def test_a_benchmark_judges_the_pictures_of_a_search_only_where_it_can_read_their_prompts():
    cfg = composed("method=noise_search", "benchmark.prompts_per_task=1")
    shapes = Shapes(prompts_per_task=1).prompts()
    assert judging(cfg, shapes) is not None and judging(cfg, [Prompt("a", "a red circle", "color", {})]) is None
    cfg.benchmark = {"_target_": f"{__name__}.Board"}
    assert judging(cfg, shapes) is None and judging(cfg, Board().prompts()) is not None
