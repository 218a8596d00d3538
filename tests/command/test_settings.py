"""Numbers that mean nothing are refused in one line.

There is one rule for each kind of number, whatever class or task it is given to.
"""

from functools import cache

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from t2i_rl.command.settings import check_root, check_settings
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Decay, Guidances, Positive, Temperature, check_arguments, check_value
from t2i_rl.data.pairs import ShapesPairs
from t2i_rl.data.prompts import PromptData
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.step import check_optimizer
from t2i_rl.models.autoregressive.engine.engine import EngineOptions
from t2i_rl.rewards.weighted_sum import WeightedSum
from tests.support.commands import composed

BASE = {
    "grpo": (),
    "lora": ("method=iris_lora",),
    "irg": ("method=irg",),
    "agsm": ("method=agsm", "model=sd_tiny"),
    "noise": ("method=noise_opt",),
    "search": ("method=noise_search",),
    "gdino": ("reward=gdino",),
    "reno": ("reward=reno",),
    "ddp": ("trainer=ddp_sim",),
    "edit": ("task=edit", "model=sd3_tiny"),
    "pretrain": ("task=pretrain",),
    "recognizer": ("task=make_recognizer",),
    "prompts": ("task=make_prompts",),
    "chat": ("task=make_irgl", "task/teacher=chat", "task.out=x"),
}
NOTHING = {
    "grpo": {
        "model.temperature": [-1, 1e9, 1e-9, True, [1.0], None, "warm"],
        "model.guidance_scale": [-3, 1e20],
        "model.max_plan_tokens": [0, -1, 2.5, True],
        "model.rollout.max_rows": [0, -4],
        "model.rollout.graphs": [1, "yes"],
        "model.dtype": [True, ["float32"]],
        "method.clip_range": [-0.2, 0, 1, 5, True],
        "method.kl_coef": [-1, 1e20, None, [0.01]],
        "method.group_size": [1, 2.5, True, [8], 8.0],
        "method.text_loss_weight": [-1, 1e20],
        "method.max_grad_norm": [0, -1, 1e20, False],
        "method.seed": [-1, 1.5, 2**32],
        "method.plan": [3, "maybe"],
        "method.trainable": ["lm_head"],
        "method.optimizer": [None, 5],
        "method.optimizer.lr": [0, -1, 1e20, True, [1e-4], "fast"],
        "method.optimizer.betas": [[0.9, 1.5], [0.9], 0.9, [-0.1, 0.9]],
        "method.optimizer.weight_decay": [-1, 1e20],
        "reward.text_sign": [2, 0.5],
        "reward.image_weight": [-1],
        "data.batch_size": [0, -1, 1e3, True],
        "data.prompts_per_task": [0],
        "data.tasks": ["position", [1, True]],
        "data.seed": [-5],
        "benchmark.samples_per_prompt": [0],
        "benchmark.size": [-32, 32.5],
        "evaluation.batch_size": [0],
        "evaluation.seed": [-1, True],
        "seed": [-1, True, 0.5],
        "num_images": [0],
        "trainer.max_steps": [2.5, 0, -1, -2, 1e3, "10", True, None],
        "trainer.devices": [0, -2, True, [0, 0], [], 1.5],
        "trainer.num_nodes": [0],
        "trainer.log_every_n_steps": [0],
        "callbacks.sample_grid.every_n_steps": [0, -1, True],
        "callbacks.checkpoint.keep_every_n_steps": [-5, 0],
    },
    "lora": {"method.lora.r": [0, True], "method.lora.lora_dropout": [1.0, -0.1], "method.lora.lora_alpha": [0]},
    "irg": {
        "method.ema": [1, -0.1],
        "method.drop_image": [1.0],
        "method.interleave.rounds": [0],
        "method.interleave.image_scale": [-2, True, [2, -4], "much"],
        "method.interleave.text_temperature": [-1],
        "method.scheduler.total_iters": [0],
        "method.scheduler.start_factor": [0, 2],
        "data.maker.right_share": [2],
        "data.count": [0],
        "callbacks.sample_grid.benchmark.prompts_per_task": [0],
    },
    "agsm": {
        "method.gamma_positive": [-1],
        "method.temperature": [0],
        "method.average_decay": [1],
        "method.layers": [0, True],
        "method.pairs_per_pass": [0],
        "model.steps": [0],
        "callbacks.validation.every_n_steps": [0],
    },
    "noise": {
        "method.optimizer.momentum": [1],
        "method.eta": [2],
        "method.patience": [0],
        "regularizer.terms.spectrum.weight": [-1],
        "regularizer.terms.moment_2.n": [0],
    },
    "search": {"method.cosine": [1, -0.1], "method.evaluations": [0]},
    "gdino": {"reward.box_threshold": [1.0, -0.1], "reward.near_pixels": [0], "reward.batch_size": [0]},
    "reno": {"reward.weights.clip": ["abc", True], "reward.parts.clip.batch_size": [0]},
    "edit": {
        "task.steps": [0],
        "task.start": [-1],
        "task.target_guidance": [-1],
        "task.cases": [0],
        "task.average": [0],
    },
    "pretrain": {
        "task.recipes.janus_tiny.vq.steps": [0],
        "task.recipes.janus_tiny.lm.optimizer.lr": [0],
        "task.recipes.janus_tiny.lm.rows.sizes.draw": [-1],
    },
    "recognizer": {"task.lr": [0, 1e20], "task.width": [0]},
    "prompts": {"task.counts.colors": [-1, 2.5]},
    "chat": {"task.words": [[0, 5], 5, [1, 2, 3]], "task.teacher.writer.timeout": [0], "task.right_share": [1.5]},
}
SOMETHING = {
    "grpo": {
        "method.kl_coef": [0, 0.0],
        "method.max_grad_norm": [None, 1, 1e9],
        "method.image_loss_weight": [0],
        "model.temperature": [0, 1, 0.7],
        "model.guidance_scale": [0, 1],
        "trainer.devices": ["auto", -1, [1], [0, 1]],
        "benchmark.tasks": [["colors"]],
        "model.revision": [2024, "main"],
    },
    "irg": {
        "method.ema": [0],
        "method.interleave.image_scale": [2, [2, 4]],
        "method.interleave.stop_above": [None, -3.5],
    },
    "agsm": {"method.layers": [3, ["down"], None], "method.buckets": [0]},
    "noise": {"method.optimizer.lr": [50, 5000], "method.balance": [None]},
    "reno": {"reward.weights.clip": [-0.5, None]},
}


@cache
def base(name: str) -> dict:
    return OmegaConf.to_container(composed(*BASE[name]), resolve=True)


def check(name: str, key: str, value) -> None:
    cfg = OmegaConf.create({group: node for group, node in base(name).items() if group != "hydra"})
    OmegaConf.update(cfg, key, value, merge=False)
    check_root(cfg)
    check_settings(cfg, [key.split(".")[0]])


def rows(table: dict) -> list:
    return [
        pytest.param(name, key, values, id=f"{name}-{key}")
        for name, keys in table.items()
        for key, values in keys.items()
    ]


@pytest.mark.parametrize(("name", "key", "values"), rows(NOTHING))
def test_a_number_that_means_nothing_is_refused_by_its_name(name, key, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{key}") as error:
            check(name, key, value)
        assert "must be" in str(error.value) and "\n" not in str(error.value), value


@pytest.mark.parametrize(("name", "key", "values"), rows(SOMETHING))
def test_edges_that_mean_something_are_taken(name, key, values):
    for value in values:
        check(name, key, value)


def test_names_that_are_the_users_own_mean_nothing_else():
    check("prompts", "task.counts.sizes", 3)


def test_a_limit_of_time_needs_no_limit_of_steps():
    trainer = {"_target_": "lightning.Trainer", "devices": 1}
    check_settings(OmegaConf.create({"trainer": {**trainer, "max_steps": -1, "max_time": "00:01:00:00"}}), ["trainer"])
    for name, value in (("limit_train_batches", 0), ("limit_train_batches", -1), ("min_steps", 0)):
        with pytest.raises(UserError, match=f"trainer.{name} must be"):
            check_settings(OmegaConf.create({"trainer": {**trainer, "max_steps": 1, name: value}}), ["trainer"])


def test_a_fraction_that_is_whole_is_shown_as_it_should_be_written():
    with pytest.raises(UserError, match=r"x must be a whole number of 1 or more, not 1000.0 \(write 1000\)"):
        check_value(1e3, Count, "x")
    with pytest.raises(UserError, match="at most 2147483647, not 2147483648"):
        check_value(2**31, Count, "x")
    with pytest.raises(UserError, match=r"x\[1\] must be a number from 0 to 100, not -2"):
        check_value([1, -2], Guidances, "x")


class Ours:
    """A class of a user's own, whose base takes what it hands on."""

    def __init__(self, share: Decay = 0.5, **options):
        super().__init__(**options)


class Base:
    def __init__(self, rate: Positive | None = None, warmth: Temperature = 1.0, plain: float = 1.0):
        pass


class Both(Ours, Base):
    pass


def test_a_users_own_class_is_checked_by_its_annotations_and_its_bases():
    for given, named in (
        ({"share": 1}, "share"),
        ({"rate": 0}, "rate"),
        ({"warmth": -1}, "warmth"),
        ({"plain": True}, "plain"),
    ):
        with pytest.raises(UserError, match=f"^mine.{named} must be"):
            check_arguments(Both, given, "mine")
    check_arguments(Both, {"share": 0, "rate": None, "warmth": 0, "plain": 3, "unknown": -1}, "mine")


def test_a_class_that_is_not_there_is_named_wherever_it_stands():
    cfg = OmegaConf.create({"callbacks": {"mine": {"_target_": "nowhere.Mine"}}})
    with pytest.raises(UserError, match="callbacks.mine._target_=nowhere.Mine: there is no such class"):
        check_settings(cfg, ["callbacks"])


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("unclosed", "class Mine(", r"cannot be imported: SyntaxError: '\(' was never closed \(unclosed.py, line 1\)"),
        ("needy", "\nimport not_there", r"cannot be imported: ModuleNotFoundError: .*'not_there' \(needy.py, line 2\)"),
        ("raising", "x = 1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(raising.py, line 1\)"),
        ("another", "class Other: pass", "there is no such class$"),
        ("absent", None, r"there is no such class \(no absent.py beside run.py or on PYTHONPATH\)"),
    ],
)
def test_a_module_of_the_users_own_that_cannot_be_imported_says_why(tmp_path, monkeypatch, name, source, said):
    monkeypatch.syspath_prepend(tmp_path)
    if source:
        (tmp_path / f"{name}.py").write_text(source)
    cfg = OmegaConf.create({"callbacks": {"mine": {"_target_": f"{name}.Mine"}}})
    with pytest.raises(UserError, match=said):
        check_settings(cfg, ["callbacks"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: PromptData(batch_size=0),
        lambda: PromptData(tasks="colors"),
        lambda: ShapesPairs(batch_size=2.0),
        lambda: Rounds(rounds=0),
        lambda: Rounds(prompt_scale=[]),
        lambda: EngineOptions(max_rows=0),
        lambda: WeightedSum({}, {"a": True}),
    ],
)
def test_constructors_refuse_the_same_when_called_from_python(make):
    with pytest.raises(UserError, match="must be"):
        make()


def test_weights_learn_at_a_rate_and_noise_climbs_at_another():
    optimizer = get_class("torch.optim.SGD")
    check_optimizer(lambda parameters: optimizer(parameters, lr=10.0), None)
    with pytest.raises(UserError, match="method.optimizer.lr must be a number above 0, and at most 10, not 50.0"):
        check_optimizer(lambda parameters: optimizer(parameters, lr=50.0), None)
