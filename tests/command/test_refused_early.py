"""What could only end a run after hours is refused before any weight loads.

This covers what chooses, what learns, what is drawn, and how a model is asked.
"""

import pytest

from t2i_rl.benchmarks.shapes import Shapes
from t2i_rl.callbacks.sample_grid import SampleGrid
from t2i_rl.callbacks.validation import Validate
from t2i_rl.core.errors import UserError
from t2i_rl.core.texts import fault_of_text
from t2i_rl.methods.irg.watch import WatchTurns
from t2i_rl.methods.trainable import check_trainable
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.tasks.examine import check_validation
from tests.support.commands import composed


@pytest.mark.parametrize("best", ["val/overall", "val/score", "val/counting", "val/over_counted", "val/fid", None])
def test_a_metric_that_validation_measures_may_choose(tmp_path, best):
    Validate(tmp_path, Shapes(prompts_per_task=1), best=best).check("callbacks.validation")


def test_a_metric_that_validation_does_not_measure_is_refused_before_training(tmp_path):
    cfg = composed("method=agsm", "model=sd_tiny")
    validate = Validate(tmp_path, Shapes(tasks=["colors"], prompts_per_task=1), fid=False, best="val/counting")
    with pytest.raises(UserError, match="callbacks.v.best=val/counting is not measured; choose from val/overall"):
        check_validation(cfg, {"v": validate})


@pytest.mark.parametrize("prompts", [[], [""], ["a cat", 5], ["a\0b"]])
def test_pictures_are_drawn_of_texts(tmp_path, prompts):
    for callback in (SampleGrid, WatchTurns):
        with pytest.raises(UserError, match="callbacks.sample_grid.prompts"):
            callback(tmp_path, prompts=prompts)


@pytest.mark.parametrize(
    ("patterns", "said"), [([], "nothing would learn"), (["("], "no regular expression"), ([1], "1")]
)
def test_what_learns_is_named_by_regular_expressions(patterns, said):
    with pytest.raises(UserError, match=f"method.trainable.*{said}"):
        check_trainable(patterns)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"system": "", "instruction": "{prompt}", "bogus": 1}, "model.chat has no bogus; it has system, instruction"),
        ({"system": ""}, "model.chat.instruction must be given"),
        ({"system": None, "instruction": "{prompt}"}, "model.chat.system must be text, not null"),
        ({"system": "", "instruction": ["{prompt}"]}, "model.chat.instruction must be text"),
    ],
)
def test_how_a_model_is_asked_is_text_of_known_names(settings, said):
    with pytest.raises(UserError, match=said):
        Chat.of(settings)


def test_letters_that_a_terminal_obeys_are_no_text():
    assert "control character" in fault_of_text("a \x1b[31m cat") and "control character" in fault_of_text("a\x07")
    assert fault_of_text("a\tcat\nand \u200d\u2028 \x85 a dog") is None
