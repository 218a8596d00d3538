"""Reflections on pictures of the world: true, in its words, and mended by what keeps what was
right."""

from dataclasses import replace

import numpy as np
import pytest

from t2i_rl.models.autoregressive.janus_tiny import build_tokenizer
from t2i_rl.shapes.examples import misremembered, sample_example
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.reflections import NO_CHANGE, named, reflect
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import Object, Scene
from t2i_rl.shapes.text import enumerate_prompts, plan


def looked_at(prompt, scene, seed=0):
    return reflect(prompt, detect(render(scene)[None])[0], scene.size, np.random.default_rng(seed))


def prompt_of(tag, text):
    return next(prompt for prompt in enumerate_prompts(tag) if prompt.text == text)


TOKENIZER = build_tokenizer()
RED = Object("circle", "red", 8.0, 8.0, 5.0)
BLUE = Object("square", "blue", 23.0, 23.0, 5.0)


@pytest.mark.parametrize("seed", range(60))
def test_the_mended_scene_is_what_was_asked_and_every_word_is_known(seed):
    rng = np.random.default_rng(seed)
    prompt, scene = sample_example(rng)
    reflection = looked_at(prompt, misremembered(scene, rng), seed)
    assert judge(prompt.meta, detect(render(reflection.scene)[None])[0]).strict
    assert named(reflection.text) == reflection.faults
    assert TOKENIZER.unk_token_id not in TOKENIZER(reflection.text).input_ids


@pytest.mark.parametrize("seed", range(20))
def test_what_is_right_is_left_alone(seed):
    rng = np.random.default_rng(seed)
    prompt, scene = sample_example(rng)
    reflection = looked_at(prompt, scene, seed)
    assert reflection.text == f"{plan(reflection.scene)} {NO_CHANGE}"
    assert reflection.faults == () and reflection.unmoved == reflection.scene.objects
    for item in reflection.scene.objects:
        nearest = min(scene.objects, key=lambda other: abs(other.x - item.x) + abs(other.y - item.y))
        assert (item.shape, item.color) == (nearest.shape, nearest.color) and abs(item.x - nearest.x) <= 1


def test_each_fault_is_told_and_mended():
    pair = prompt_of("color_attr", "a red circle and a blue square")
    cases = {
        "no blue square": [RED],
        "a green square at the bottom right": [RED, replace(BLUE, color="green")],
        "a black cross at the top right": [RED, BLUE, Object("cross", "black", 24.0, 8.0, 5.0)],
    }
    for fault, objects in cases.items():
        reflection = looked_at(pair, Scene(tuple(objects)))
        assert reflection.faults == (fault,), fault
        assert len(reflection.unmoved) == (2 if "cross" in fault else 1)
        assert "two objects." in reflection.text
    assert ": draw a blue square." in looked_at(pair, Scene((RED, replace(BLUE, color="green")))).text
    assert ": clear." in looked_at(pair, Scene((RED, BLUE, Object("cross", "black", 24.0, 8.0, 5.0)))).text


def test_a_reflection_begins_with_what_the_picture_shows():
    pair = prompt_of("color_attr", "a red circle and a blue square")
    objects = "two objects. a red circle at the top left. a green square at the bottom right. "
    shown = f"{objects}a green square at the bottom right: "
    assert looked_at(pair, Scene((RED, replace(BLUE, color="green")))).text.startswith(shown)
    assert looked_at(pair, Scene(())).text.startswith("no objects. no red circle: ")


def test_a_wrong_side_is_told_and_the_other_object_stays():
    pair = prompt_of("position", "a red circle right of a blue square")
    reflection = looked_at(pair, Scene((RED, replace(BLUE, y=8.0))))
    assert len(reflection.faults) == 1 and "draw at the" in reflection.text
    assert judge(pair.meta, detect(render(reflection.scene)[None])[0]).strict


def test_a_wrong_count_is_told_object_by_object():
    three = prompt_of("counting", "three red circles")
    reflection = looked_at(three, Scene((RED,)))
    assert reflection.faults == ("no red circle", "no red circle")
    assert len(reflection.unmoved) == 1 and len(reflection.scene.objects) == 3
