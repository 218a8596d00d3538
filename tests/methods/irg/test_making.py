"""IRGL data as the maker writes it: in two goes as in one, everything that is left out counted, the world's own
lessons."""

from dataclasses import replace

import numpy as np
import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.methods.irg.data import Trajectories
from t2i_rl.methods.irg.make import Maker
from t2i_rl.methods.irg.world import World
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import COLORS, Object, Scene
from t2i_rl.shapes.suites import pair_split
from t2i_rl.tasks.make_irgl import distinct
from tests.support.tiny import load_tiny_janus, save_tiny_janus


@pytest.fixture(scope="module")
def janus_folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


class Scripted:
    """A model that draws what is given it."""

    family = "autoregressive"

    def __init__(self, janus, images):
        self.janus, self.images, self.drawn = janus, images, []

    def prepare(self):
        pass

    def sampling(self):
        return {"name": "scripted"}

    def state_dict(self):
        return self.janus.state_dict()

    def generate(self, prompts, seeds, mode, fresh):
        self.drawn += prompts
        return type(
            "G",
            (),
            {"images": np.stack([self.images[text] for text in prompts]), "plans": ["one object."] * len(prompts)},
        )


@pytest.fixture
def world(janus_folder):
    """Prompts, and a model that draws every other one rightly."""
    rng, prompts, images = np.random.default_rng(5), [], {}
    while len(prompts) < 8:
        (prompt, scene), (_, other) = sample_example(rng), sample_example(rng)
        if prompt.text not in images:
            images[prompt.text] = render(scene if len(prompts) % 2 else other)
            prompts.append(prompt)
    return prompts, Scripted(load_tiny_janus(janus_folder).model, images)


class KilledAt(World):
    """The process ends while this prompt is being taught."""

    def __init__(self, prompt):
        super().__init__()
        self.prompt = prompt

    def improve(self, prompts, *rest):
        if self.prompt in prompts:
            raise KeyboardInterrupt
        return super().improve(prompts, *rest)


def test_data_made_in_two_goes_is_data_made_in_one(world, tmp_path):
    prompts, model = world
    whole = Maker(World(), shard_size=3).make(tmp_path / "one", model, prompts)
    with pytest.raises(KeyboardInterrupt):
        Maker(KilledAt(prompts[3]), shard_size=3).make(tmp_path / "two", model, prompts)
    model.drawn.clear()
    assert Maker(World(), shard_size=3).make(tmp_path / "two", model, prompts) == whole
    assert model.drawn == [prompt.text for prompt in prompts[3:]]  # the finished shard is not drawn again
    for file in sorted((tmp_path / "one").rglob("*.parquet")):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    with pytest.raises(UserError, match="made with other settings"):
        Maker(World(), shard_size=4).make(tmp_path / "one", model, prompts)


def test_the_manifest_counts_what_is_there_and_what_was_left_out(world, tmp_path):
    prompts, model = world
    again = replace(prompts[0], id="again", text=prompts[0].text.upper())
    assert [each.id for each in distinct([*prompts, again])] == [each.id for each in prompts]
    maker = Maker(World(), right_share=0.0)
    assert len(set(maker.seeds([prompts[0], prompts[0], prompts[1]]))) == 3  # what comes again is drawn anew
    manifest = maker.make(tmp_path, model, prompts)
    assert manifest["counts"]["initial_full_learning"] == 8
    wrong = manifest["counts"]["improving_full_learning"]
    assert 0 < wrong <= 4
    assert manifest["left_out"]["improving_full_learning: nothing wrong with the weak picture"] == 8 - wrong
    read = Trajectories(str(tmp_path), batch_size=2)
    assert sum(count for _, count in read.shards()["improving_full_learning"]) == wrong
    short = Maker(World(), words=(1, 3)).make(tmp_path / "short", model, prompts)
    assert (
        short["counts"]["initial_full_learning"] == 0
        and short["left_out"]["initial_full_learning: length of the text"] == 8
    )


def test_what_comes_again_is_too_long_or_in_another_language_is_left_out_and_counted(world, tmp_path):
    prompts, model = world
    full = "initial_full_learning"

    class OneSeed(Maker):
        def seeds(self, prompts):
            return [7] * len(prompts)

    manifest = OneSeed(World(), shard_size=3).make(tmp_path / "twice", model, [prompts[0], *prompts, prompts[0]])
    assert manifest["counts"][full] == len(prompts)  # of the same prompt and seed one row is kept, in other shards too
    assert manifest["left_out"][f"{full}: duplicate"] == 2

    read = []
    manifest = Maker(World()).make(
        tmp_path / "long", model, prompts, fits=lambda segments: read.append(len(segments)) or len(segments) < 5
    )
    assert manifest["counts"][full] == len(prompts) and manifest["counts"]["improving_full_learning"] == 0
    assert (
        manifest["left_out"]["improving_full_learning: longer than the model's positions"]
        == sum(n == 5 for n in read) // 2
        == len(prompts)
    )

    class Greek(World):
        def initial(self, prompts, seeds):
            return [
                ("τρεις κόκκινοι κύκλοι" if number == 2 else text, image)
                for number, (text, image) in enumerate(super().initial(prompts, seeds))
            ]

    manifest = Maker(Greek()).make(tmp_path / "greek", model, prompts)
    assert manifest["left_out"][f"{full}: language of the text"] == 1 and manifest["counts"][full] == len(prompts) - 1
    assert Maker(Greek(), ascii_share=0.0).make(tmp_path / "any", model, prompts)["counts"][full] == len(prompts)


def test_a_row_that_stands_on_the_models_own_empty_thought_is_left_out(world, tmp_path):
    prompts, model = world
    drawn = model.generate
    model.generate = lambda *given, **named: replaced(
        drawn(*given, **named), ["", *["one object."] * (len(prompts) - 1)]
    )
    manifest = Maker(World()).make(tmp_path, model, prompts)
    for mode in ("improving_full_learning", "improving_thinking_generation_learning"):
        assert manifest["left_out"][f"{mode}: length of the text that the model thought itself"] == 1
    assert "initial_full_learning: length of the text" not in manifest["left_out"]
    assert len(manifest["left_out"]) == 2  # the third has no R1


def replaced(drawn, plans: list[str]):
    drawn.plans = plans
    return drawn


@pytest.mark.parametrize(
    "options",
    [
        {"shard_size": 2.5},
        {"shard_size": "abc"},
        {"right_share": "abc"},
        {"words": 5},
        {"words": [0, 9]},
        {"ascii_share": 2},
    ],
)
def test_options_of_the_maker_are_checked(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Maker(World(), **options)


def test_the_world_teaches_its_own_prompts_only(world, tmp_path):
    with pytest.raises(UserError, match="'a dog' has no 'include'"):
        Maker(World()).make(tmp_path, world[1], [Prompt("0", "a dog")])


def test_no_held_out_pair_of_objects_is_learnt():
    """Prompts that name one are refused; of other prompts, a picture that has one in it (in colours that were free) is
    left out."""
    every = (f"{color} circle + {other} square" for color in COLORS for other in COLORS)
    pairs = {pair_split(pair): [name.split()[0] for name in pair.split(" + ")] for pair in every}
    verdicts = {}
    for split, colors in pairs.items():
        objects = (Object("circle", colors[0], 8.0, 16.0, 5.0), Object("square", colors[1], 24.0, 16.0, 5.0))
        free = [{"class": item.shape, "count": 1} for item in objects]
        asked = [clause | {"color": item.color} for clause, item in zip(free, objects, strict=True)]
        prompts = [
            Prompt("0", "two", tag="two_object", meta={"include": include, "exclude": []}) for include in (free, asked)
        ]
        verdicts[split] = World().inconsistent(prompts[:1], [render(Scene(objects, 32))])
        if split == "train":
            World().check(prompts)
        else:
            with pytest.raises(UserError, match="kept for the test prompts"):
                World().check(prompts)
    assert verdicts == {"train": [None], **dict.fromkeys(("validation", "test"), ["a held-out pair of objects"])}


def test_the_world_mends_what_is_wrong_and_leaves_what_is_right():
    (prompt, scene), (_, other) = (sample_example(np.random.default_rng(seed)) for seed in (5, 6))
    weak = np.stack([render(scene) // 8 * 8, render(other)])  # a little off, as what is drawn is
    right, wrong = World().improve([prompt, prompt], weak, weak, [0, 1])
    assert right[0].endswith(World.stop) and np.array_equal(right[1], weak[0])
    assert not wrong[0].endswith(World.stop) and World().inconsistent([prompt], [wrong[1]]) != [
        "picture and prompt disagree"
    ]
    assert not np.array_equal(wrong[1], weak[1])
