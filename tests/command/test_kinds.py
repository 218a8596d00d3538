"""A setting of a kind that no reader takes is refused in one line that names it."""

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from t2i_rl.command.checks import check_classes, check_config
from t2i_rl.command.settings import check_kinds, check_root, check_settings
from t2i_rl.core.choices import choices
from t2i_rl.core.errors import UserError
from tests.support.commands import composed


@pytest.fixture(scope="module")
def whole() -> dict:
    """Compositions, made once: each test changes a copy."""
    names = {"iris": ["trainer=cpu"], "irg": ["method=irg"], "edit": ["task=edit", "model=sd3_tiny"]}
    return {name: composed(*overrides) for name, overrides in names.items()}


def changed(config, **settings):
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    del copy["hydra"]
    for key, value in settings.items():
        OmegaConf.update(copy, key, value, force_add=True)
    return copy


def check(config, task: str) -> None:
    check_kinds(config, task)
    check_root(config)
    check_settings(config, list(config))


def test_what_is_shipped_passes(whole):
    for name, config in whole.items():
        check(changed(config), "edit" if name == "edit" else "train")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("evaluation.stages", "base_plan", r"a list, like \[base_plan\]"),
        ("evaluation.stages", None, "must be given, not null"),
        ("evaluation", None, "a mapping"),
        ("evaluation.seed", "a", "a whole number"),
        ("data.tasks", "counting", r"a list, like \[counting\]"),
        ("benchmark.tasks", "counting", "a list"),
        ("tags", "paper", "a list"),
        ("method.trainable", "model", "a list"),
        ("callbacks.sample_grid.prompts", "a cat", "a list"),
        ("method.group_size", None, "a whole number of 2 or more"),
        ("method.group_size", [1], r"a whole number of 2 or more .*, not \[1\]"),
        ("method.plan", None, "true or false, not null"),
        ("method.optimizer", None, "what a class makes"),
        ("method.optimizer.lr", None, "a number above 0.*, not null"),
        ("method.optimizer.betas", 0.9, "a list"),
        ("model.chat", 5, "a mapping"),
        ("model.dtype", None, "one of float32, bfloat16, float16, not null"),
        ("trainer.max_steps", "abc", "a whole number of 1 or more, not 'abc'"),
        ("trainer.max_steps", None, "a whole number of 1 or more, not null"),
        ("callbacks.sample_grid.every_n_steps", "a", "a whole number of 1 or more, not 'a'"),
        ("callbacks.checkpoint", 5, "settings with a _target_, or null"),
        ("logger.csv.folder", None, "text"),
        ("watch", None, "~watch.<name>"),
        ("watch.oracle", "oracle", "settings with a _target_, or null"),
        ("paths.root_dir", None, "text, not null"),
        ("seed", "x", "a whole number"),
        ("variant", None, "text"),
        ("model.dtype", "float31", "one of float32, bfloat16, float16, not 'float31'"),
        ("model.device", "gpu:0", "auto, cpu, mps or a GPU"),
        ("model.rollout.dtype", "half", "one of float32, bfloat16, float16, or null"),
        ("model.rollout", "fast", "what a class makes"),
        ("callbacks.progress.every_seconds", -1, "a number of 0 or more"),
        ("trainer.max_time", "abc", "a time as days:hours:minutes:seconds"),
        ("trainer.max_time", -1, "a time as days:hours:minutes:seconds"),
        ("trainer.devices", "0,0", "a list of different ones"),
        ("trainer.detect_anomaly", 3, "true or false"),
        ("task_name", ["a"], "text"),
        ("prompts_file", ["a"], "text, or null"),
        ("watch.mine", {"size": 3}, r"names no class \(_target_\): take \+reward@watch.mine"),
    ],
)
def test_a_setting_of_another_kind_is_refused(whole, key, value, said):
    with pytest.raises(UserError, match=said) as error:
        check(changed(whole["iris"], **{key: value}), "train")
    assert str(error.value).startswith(key) and "\n" not in str(error.value)


def test_settings_of_a_task_are_held_against_its_config(whole):
    with pytest.raises(UserError, match="task.steps must be a whole number, not 'abc'"):
        check(changed(whole["edit"], **{"task.steps": "abc"}), "edit")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("watch.oracle", None),
        ("callbacks.checkpoint", None),
        ("optimized_metric", None),
        ("method.lora", {"r": 4}),
        ("trainer.devices", [0]),
        ("trainer.devices", "auto"),
        ("trainer.devices", "0,1"),
        ("trainer.devices", "2"),
        ("trainer.devices", "1,"),
        ("trainer.max_time", "00:01:00:00"),
        ("trainer.max_time", {"hours": 1}),
        ("model.device", "cuda:1"),
        ("method.scheduler", None),
        ("model.rollout", None),
    ],
)
def test_what_a_reader_takes_passes(whole, key, value):
    check(changed(whole["iris"], **{key: value}), "train")


@pytest.mark.parametrize(
    ("key", "said"), [("logger", "logger=none"), ("trainer", "leave ~trainer out"), ("watch", "~watch")]
)
def test_what_a_run_has_to_have_is_not_taken_out(whole, key, said):
    config = changed(whole["iris"])
    del config[key]
    with pytest.raises(UserError, match=said):
        check(config, "train")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method.judge", "oracle"),
        ("method.interleave", [1]),
        ("data.maker.teacher", "chat"),
        ("callbacks.sample_grid.benchmark", "shapes"),
        ("callbacks.sample_grid.benchmark", {"size": 32}),
    ],
)
def test_a_value_in_the_place_of_a_part_is_refused(whole, key, value):
    config = changed(whole["irg"])
    OmegaConf.update(config, key, value, merge=False)
    with pytest.raises(UserError, match=rf"{key} must be what a class makes \(_target_: ...\)"):
        check(config, "train")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "x"}, "prompt= is read by task=generate and task=judge and task=edit, and not by task=train"),
        ({"prompts_file": "x"}, "prompts_file= is read by"),
        ({"image": "x"}, "image= is read by"),
        ({"latents": "x"}, "latents= is read by task=gaussianity"),
        ({"path": "x"}, "path=x is read by model=janus alone: take model=janus, or model.path=x"),
    ],
)
def test_what_nobody_reads_is_refused(whole, given, said):
    with pytest.raises(UserError, match=said):
        check_config(changed(whole["iris"], **given))


def test_the_path_of_a_checkpoint_is_read_by_the_model_without_one_of_its_own():
    config = changed(composed("model=janus", "path=somewhere"))
    with pytest.raises(UserError, match="somewhere"):  # looked for, and not refused as a setting that nobody reads
        get_class(config.model._target_).image_size(config.model)
    check_config(config)
    check_classes(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=irg"],
        ["method=irg", "callbacks.sample_grid.benchmark=null"],
        ["method=irg", "+reward@method.judge=soft_oracle", "method.interleave.choose=true"],
        ["method=irg_grpo"],
        ["method=agsm", "model=sd_tiny", "callbacks.validation.fid=false"],
        ["method=noise_opt", "regularizer=gper"],
        ["task=make_irgl", "task.out=x"],
        ["trainer.devices='0,1'", "+trainer.max_time=00:01:00:00"],
    ],
)
def test_parts_that_are_made_pass_every_check(overrides):
    config = changed(composed("trainer=cpu", *overrides))
    check_config(config)
    check_classes(config)


def test_adafactor_has_two_numbers_for_eps():
    optimizer = "{_target_: torch.optim.Adafactor, _partial_: true, lr: 1e-3, eps: [null, 1e-3]}"
    check_classes(changed(composed("trainer=cpu", "~method.optimizer", f"+method.optimizer={optimizer}")))


def test_every_part_that_may_be_left_out_has_a_config_of_its_name():
    assert {"sample_grid", "checkpoint", "progress", "rng_state", "validation"} <= set(choices("callbacks"))
