"""Scenes, renders, prompts, plans and splits of the embedded world."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.pretrain.measure import plan_holds
from t2i_rl.shapes.examples import sample_example, scene_pairs
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import COLORS, apart, radii, relation_holds, sample_scene
from t2i_rl.shapes.suites import SPLITS, held_out, object_pairs, pair_split, select_prompts, split_of, wishes
from t2i_rl.shapes.text import EXTRA_TASKS, GENEVAL_TASKS, enumerate_prompts, plan

SMALL_TASKS = (*GENEVAL_TASKS, "complex", "negation", "knowledge")


def digest(prompts) -> str:
    rows = [[p.id, p.text, p.tag, p.meta] for p in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def test_the_prompt_selections_are_pinned():
    """A change of wording, hash or order is a new version of the benchmark: bump Shapes.version and
    these."""
    assert digest(select_prompts("test", 40)) == "e0edd1fbd5842a7e0fe303a4d88ca2db56922eff83d6c1ca393754db1d14ac7a"
    assert (
        digest(select_prompts("validation", 40)) == "39b9943a23a57a729c31206feab939bcb20a338efc9e6f5a1e1f89e5d87e3585"
    )
    assert digest(select_prompts("train", 400)) == "2261e0f9bdec5f99bfa4f2166900254d4d1f2c392d4756924fa55770a5b4fa09"


@pytest.mark.parametrize("tag", SMALL_TASKS)
def test_splits_share_no_text_and_each_held_out_pair_stays_in_its_own(tag):
    selected = {split: select_prompts(split, 10**6, (tag,)) for split in SPLITS}
    texts = [prompt.text for prompts in selected.values() for prompt in prompts]
    assert len(set(texts)) == len(texts) and all(selected.values())
    named = {
        split: {pair for prompt in prompts for pair in object_pairs(prompt)} for split, prompts in selected.items()
    }
    assert all(pair_split(pair) == "train" for pair in named["train"])
    assert not any(pair_split(pair) == "test" for pair in named["validation"])


def test_about_a_tenth_of_pairs_is_held_out_and_test_and_validation_are_half_of_each():
    pairs = {pair for prompt in enumerate_prompts("color_attr") for pair in object_pairs(prompt)}
    assert 0.05 < np.mean([pair_split(pair) != "train" for pair in pairs]) < 0.15
    for split, tag in itertools.product(("test", "validation"), ("position", "color_attr", "counting")):
        chosen = select_prompts(split, 40, (tag,))
        assert len(chosen) == 40 and sum(held_out(prompt) for prompt in chosen) == 20
        assert [prompt.meta["seen"] for prompt in chosen] == [not held_out(prompt) for prompt in chosen]


@pytest.mark.parametrize(("tag", "size"), [*((tag, 32) for tag in SMALL_TASKS), ("texture", 48), ("size", 64)])
def test_a_scene_drawn_for_a_prompt_is_what_it_asks(tag, size):
    rng = np.random.default_rng(0)
    pool = list(enumerate_prompts(tag, size))
    for index in rng.integers(0, len(pool), 40):
        prompt = pool[index]
        scene = sample_scene(wishes(prompt), rng, size)
        items = scene.objects
        assert len(items) == sum(clause["count"] for clause in prompt.meta["include"])
        assert all(apart(a, b) for i, a in enumerate(items) for b in items[i + 1 :])
        assert all(min(item.box) >= 1 and max(item.box) <= size - 1 for item in items)
        assert all((2 * item.x).is_integer() and (2 * item.y).is_integer() for item in items)
        for wish, item in zip(wishes(prompt), items, strict=True):
            assert item.shape == wish.shape and wish.color in (None, item.color)
            if wish.relation:
                assert relation_holds(wish.relation[0], item, items[wish.relation[1]])
        image = render(scene)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        for item in items if tag != "texture" else ():
            assert np.abs(
                image[int(item.y), int(item.x)].astype(int) - COLORS[item.color]
            ).max() <= 100 or item.shape in ("ring",)


def test_the_training_stream_holds_no_held_out_pair_and_is_a_function_of_its_seed():
    examples = [sample_example(np.random.default_rng(5)) for _ in range(2)]
    assert examples[0] == examples[1]
    rng = np.random.default_rng(6)
    for _ in range(300):
        prompt, scene = sample_example(rng)
        assert split_of(prompt) == "train" and all(pair_split(pair) == "train" for pair in scene_pairs(scene))


def test_a_plan_names_every_object_and_varies():
    rng = np.random.default_rng(1)
    for _ in range(100):
        prompt, scene = sample_example(rng)
        assert plan_holds(plan(scene, rng), prompt.meta["include"]) and plan_holds(plan(scene), prompt.meta["include"])
        assert not plan_holds(
            plan(scene).replace("circle", "cross").replace("square", "cross").replace("triangle", "ring"),
            prompt.meta["include"],
        ) or all(clause["class"] == "cross" for clause in prompt.meta["include"])
    assert len({plan(scene, rng) for _ in range(20)}) > 1 and plan(scene) == plan(scene)


def test_a_knowledge_prompt_carries_its_rewrite():
    prompts = list(enumerate_prompts("knowledge"))
    assert all(prompt.meta["rewrite"] and prompt.meta["explanation"] for prompt in prompts)
    tricycle = next(p for p in prompts if p.text == "as many triangles as wheels on a tricycle")
    assert tricycle.meta["rewrite"] == "three triangles" and tricycle.meta["include"] == [
        {"class": "triangle", "count": 3}
    ]


@pytest.mark.parametrize("arguments", [("valid", 1), ("test", 1, ("nonsense",)), ("test", 1, ("texture",))])
def test_unknown_splits_tasks_and_canvases_are_refused(arguments):
    with pytest.raises(UserError) as error:
        select_prompts(*arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        radii(33)


def test_every_word_of_the_world_is_in_the_tiny_vocabulary():
    from t2i_rl.models.autoregressive.janus_tiny import build_tokenizer

    tokenizer = build_tokenizer()
    texts = [prompt.text for tag in (*GENEVAL_TASKS, *EXTRA_TASKS) for prompt in enumerate_prompts(tag, 48)][::37]
    rng = np.random.default_rng(0)
    texts += [plan(sample_example(rng)[1], rng) for _ in range(50)]
    assert all(tokenizer.unk_token_id not in tokenizer(text).input_ids for text in texts)
    assert all(tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text for text in texts)
