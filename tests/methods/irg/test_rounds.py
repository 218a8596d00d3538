"""The loop of thinking, drawing and reflecting on a scripted model: branches, retries, stops, the judge's choice."""

import numpy as np
import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.methods.irg.rounds import Rounds, says_stop
from t2i_rl.models.autoregressive.segments import Written


class Scripted:
    """Writes what it is told, in order, and draws black; notes what it was asked."""

    def __init__(self, texts):
        self.texts, self.asked = list(texts), []

    def write(self, contexts, role, seeds, max_tokens, temperature):
        self.asked.append((role, tuple(seeds)))
        return [Written(*self.texts.pop(0), 2) for _ in contexts]

    def draw(self, branches, role, guidance, seeds, temperature):
        self.asked.append(
            (
                role,
                guidance,
                [[context and [each.role for each in context] for context in branch] for branch in branches],
            )
        )
        return np.zeros((len(branches[0]), 4, 4, 3), np.uint8), [None] * len(branches[0])


def test_the_branches_are_those_of_the_paper():
    model = Scripted([("a plan", True), ("better", True)])
    Rounds(guidance_scale=4.0, reflection_scale=3.0, image_scale=2.0).run(model, ["a red circle"], [0])
    assert model.asked[1] == ("draw", (4.0,), [[["prompt", "think"]], [None]])
    assert model.asked[3] == (
        "redraw",
        (3.0, 2.0, 1.0),
        [
            [["prompt", "think", "draw", "reflect"]],
            [["prompt", "think", "draw"]],
            [["prompt", "think", "reflect"]],
            [None],
        ],
    )


def test_texts_that_are_empty_or_cut_are_written_again_and_then_kept_and_marked():
    model = Scripted([("", True), ("cut", False), ("a plan", True)])
    drawn = Rounds(rounds=1).run(model, ["a red circle"], [0])[0]
    assert (
        drawn.texts == ["a plan"] and drawn.unfinished == [False] and len({seeds for _, seeds in model.asked[:3]}) == 3
    )
    drawn = Rounds(rounds=1, retries=1).run(Scripted([("", True), ("cut", False)]), ["a red circle"], [0])[0]
    assert drawn.texts == ["cut"] and drawn.unfinished == [True]


def test_scales_may_differ_from_round_to_round():
    model = Scripted([("a plan", True), ("b", True), ("c", True), ("d", True)])
    Rounds(rounds=4, reflection_scale=[4.0, 3.0], image_scale=2.0).run(model, ["a red circle"], [0])
    assert [asked[1] for asked in model.asked[3::2]] == [(4.0, 2.0, 1.0), (3.0, 2.0, 1.0), (3.0, 2.0, 1.0)]


def test_a_judge_may_end_the_trajectory_and_choose_the_answer():
    texts = [(word, True) for word in ("a", "b", "c", "d", "e", "f")]
    scores = {0: iter((0.2, 0.9)), 1: iter((0.6, 0.1, 0.3))}

    def judge(numbers, images):
        return [next(scores[number]) for number in numbers]

    first, second = Rounds(rounds=3, stop_above=0.9, choose=True).run(Scripted(texts), ["one", "two"], [0, 1], judge)
    assert (first.scores, first.answer, len(first.images)) == ([0.2, 0.9], 1, 2)
    assert (second.scores, second.answer, len(second.images)) == ([0.6, 0.1, 0.3], 0, 3)
    with pytest.raises(UserError, match="need a judge"):
        Rounds(choose=True).run(Scripted(texts), ["one"], [0])


def test_a_reflection_may_end_the_trajectory(monkeypatch):
    model = Scripted([("a plan", True), ("a plan", True), ("stop", True), ("better", True)])
    ticks = iter((0.0, 2.0, 2.0, 6.0, 6.0, 16.0, 16.0, 36.0))  # two plans, two pictures, two reflections, one picture
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    done, changed = Rounds(stop="stop").run(model, ["one", "two"], [0, 1])
    assert [each.role for each in done.segments] == ["prompt", "think", "draw", "reflect"]
    assert [each.role for each in changed.segments] == ["prompt", "think", "draw", "reflect", "redraw"]
    assert done.seconds == [1 + 2 + 5] and changed.seconds == [
        1 + 2,
        5 + 20,
    ]  # the first's with the reflection that ended it


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "none"},
        {"rounds": 0},
        {"retries": -1},
        {"image_scale": []},
        {"text_temperature": -0.1},
        {"reflection_scale": "abc"},
        {"image_scale": None},
        {"prompt_scale": [2, float("nan")]},
        {"stop": ""},
        {"stop": " ."},
        {"stop": True},
    ],
)
def test_options_of_the_loop_are_checked(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Rounds(**options)


def test_stopping_is_read_whatever_its_case_and_punctuation():
    assert all(
        says_stop(text, "No change needed.")
        for text in ("No change needed.", "It is fine. no change needed", "No change needed!\n")
    )
    assert not any(says_stop(text, "No change needed.") for text in ("", "No change needed? Draw a circle.", "change"))
    assert not says_stop("stop.", None)
    assert not says_stop(
        "Move the cat: with the dog there is no change needed.", "No change needed."
    )  # no sentence of its own
    assert all(
        says_stop(text, "No change needed.")
        for text in ("one cat\nNo change needed.", "- No change needed.", "It fits, no change needed")
    )
