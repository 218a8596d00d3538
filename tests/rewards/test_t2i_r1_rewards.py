"""T2I-R1's rewards on small random checkpoints of the real classes, saved and loaded through the
real path."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.rewards.clip_score import ClipScore
from t2i_rl.rewards.gdino import GroundingDino, spans
from t2i_rl.rewards.git_vqa import GitVQA, phrases_of
from t2i_rl.rewards.length import Length
from t2i_rl.rewards.open_clip import convert
from t2i_rl.rewards.orm import ORM
from t2i_rl.rewards.weighted_sum import WeightedSum
from t2i_rl.rewards.yes_no import yes_share
from tests.support.small_rewards import OpenClip, save_small_gdino, save_small_git, save_small_hps, save_small_orm

IMAGES = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
METAS = [
    {"nouns": ["car", "dog"], "attr_nouns": ["red car", "blue dog"], "task_type": "color"},
    {"nouns": ["cup"], "numeracy_info": [{"obj_name": "cup", "num": 2}], "task_type": "numeracy"},
    {
        "nouns": ["cat", "bench"],
        "spatial_info": {"obj1": "cat", "obj2": "bench", "locality": "left of"},
        "task_type": "spatial",
    },
    {"nouns": ["traffic light"], "task_type": "object"},
]
TEXTS = ["a red car and a blue dog", "two cup", "a cat left of a bench", "a photo of a traffic light"]
ROLLOUT = SimpleNamespace(
    images=IMAGES, prompts=[Prompt(str(i), text, "", meta) for i, (text, meta) in enumerate(zip(TEXTS, METAS))]
)
QUESTION, TEMPLATE = "a {prompt} ?", "<|im_start|>user {image}\n{question}<|im_end|><|im_start|>assistant\n"


def load_hps(path, **settings):
    return ClipScore(str(path), device=None, **settings)


def load_gdino(path, **settings):
    return GroundingDino(str(path), device=None, **settings)


def load_git(path, **settings):
    return GitVQA(str(path), device=None, **settings)


def load_orm(path, **settings):
    return ORM(
        str(path), **{"question": QUESTION, "template": TEMPLATE, "dtype": "float32", "device": None, **settings}
    )


KINDS = {
    "hps": (save_small_hps, load_hps),
    "gdino": (save_small_gdino, load_gdino),
    "git": (save_small_git, load_git),
    "orm": (save_small_orm, load_orm),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, (save, _) in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_batched_is_one_at_a_time_and_deterministic(folders, kind):
    load = KINDS[kind][1]
    together, alone = load(folders[kind], batch_size=4)(ROLLOUT).total, load(folders[kind], batch_size=1)(ROLLOUT).total
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (4,) and together.dtype == torch.float64 and len(together.unique()) > 1
    assert torch.equal(load(folders[kind], batch_size=4)(ROLLOUT).total, together)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "other", "truncated", "gone"])
def test_a_bad_checkpoint_is_one_line(folders, tmp_path, kind, damage):
    folder = tmp_path / "checkpoint"
    if damage != "missing":
        shutil.copytree(folders[kind], folder)
    if damage == "other":
        (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    elif damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:3000])
    elif damage == "gone":
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        KINDS[kind][1](folder)
    assert "\n" not in str(error.value) and "checkpoint" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_without_words_and_weights_of_other_shapes_are_one_line(folders, tmp_path, kind):
    wordless = shutil.copytree(folders[kind], tmp_path / "wordless")
    for file in wordless.glob("token*"):
        file.unlink()
    with pytest.raises(UserError) as error:
        KINDS[kind][1](wordless)
    assert "\n" not in str(error.value) and "wordless" in str(error.value)
    other = shutil.copytree(folders[kind], tmp_path / "other")
    state = load_file(other / "model.safetensors")
    name = next(name for name, value in state.items() if value.ndim == 2)
    state[name] = torch.zeros(len(state[name]) + 1, state[name].shape[1])
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="other shapes"):
        KINDS[kind][1](other)


def test_gdino_refuses_what_it_cannot_look_for(folders):
    reward = load_gdino(folders["gdino"])
    assert [reward.refuses(Prompt("0", "x", "", meta)) for meta in METAS] == [None] * 4
    strange = {"nouns": ["car"], "spatial_info": {"obj1": "car", "obj2": "dog", "locality": "inside"}}
    for meta, why in (
        (strange, "inside"),
        ({"nouns": []}, "no nouns"),
        ({"nouns": ["cat"] * 5 + list(map(str, range(90)))}, "tokens"),
    ):
        assert why in reward.refuses(Prompt("0", "x", "", meta))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers_are_refused_when_they_load(folders, tmp_path, kind):
    shutil.copytree(folders[kind], tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    state = load_file(file)
    for name in state:
        if name.endswith("weight") and state[name].ndim > 1:
            state[name] = torch.full_like(state[name], float("nan"))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights that are not finite"):
        KINDS[kind][1](tmp_path / "broken")


def test_a_part_that_is_no_number_is_raised_by_the_sum():
    class Broken(Reward):
        def __call__(self, rollout):
            return RewardOutput(torch.full((len(rollout),), float("nan"), dtype=torch.float64))

    with pytest.raises(UserError, match="not finite"):
        WeightedSum({"only": Broken()}, {"only": 1.0})(Sized())


class Sized(SimpleNamespace):
    """A rollout of two groups of two."""

    def __init__(self):
        super().__init__(**vars(ROLLOUT), group_size=2)

    def __len__(self):
        return 4


def test_hps_is_the_cosine_of_the_two_embeddings(folders):
    reward = load_hps(folders["hps"])
    model, expected = reward.model.double(), []
    for image, text in zip(IMAGES, TEXTS):
        pixels = reward.image_processor(images=[image], return_tensors="pt")["pixel_values"].double()
        a = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        b = model.text_projection(model.text_model(**reward.tokenizer(text, return_tensors="pt")).pooler_output)[0]
        expected.append(float(a @ b / (a.norm() * b.norm())))
    assert load_hps(folders["hps"])(ROLLOUT).total.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("file", ["hps.pt", "hps.safetensors"])
def test_an_open_clip_file_gives_what_its_own_architecture_gives(folders, tmp_path, file):
    torch.manual_seed(0)
    plain = load_hps(folders["hps"])
    their = OpenClip(len(plain.tokenizer)).eval()
    state = {name: value.contiguous() for name, value in their.state_dict().items()}
    if file.endswith("safetensors"):
        save_file(state, tmp_path / file)
    else:
        torch.save({"state_dict": state}, tmp_path / file)
    reward = load_hps(tmp_path, file=file, processor=folders["hps"], text_heads=4, vision_heads=2)
    pixels = plain.image_processor(images=list(IMAGES), return_tensors="pt")["pixel_values"]
    ids = plain.tokenizer(TEXTS, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = their.cosine(pixels, ids, plain.tokenizer.eos_token_id)
    torch.testing.assert_close(reward(ROLLOUT).total, expected.double(), rtol=1e-4, atol=1e-5)
    third_layer = {f"text_model.encoder.layers.2.{name}" for name in names_of_a_layer(plain)}
    assert set(convert(state)) <= set(plain.model.state_dict()) | third_layer


def names_of_a_layer(reward: ClipScore) -> set[str]:
    prefix = "text_model.encoder.layers.0."
    return {name.removeprefix(prefix) for name in reward.model.state_dict() if name.startswith(prefix)}


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_an_open_clip_file_is_never_executed_and_a_broken_one_is_one_line(folders, tmp_path):
    settings = {"file": "hps.pt", "processor": folders["hps"]}
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "hps.pt")
    with pytest.raises(UserError, match="broken") as error:
        load_hps(tmp_path, **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "sprung").exists()
    torch.save({"state_dict": {"something": torch.zeros(2)}}, tmp_path / "hps.pt")
    with pytest.raises(UserError, match="no CLIP"):
        load_hps(tmp_path, **settings)
    for content in ([1, 2], {"state_dict": 5}, {"state_dict": {"a": "b"}}):
        torch.save(content, tmp_path / "hps.pt")
        with pytest.raises(UserError, match="named tensors"):
            load_hps(tmp_path, **settings)
    for content in (b"", b"<html>not found</html>"):
        (tmp_path / "hps.pt").write_bytes(content)
        with pytest.raises(UserError, match="broken"):
            load_hps(tmp_path, **settings)
    torch.save({"state_dict": {"something": torch.zeros(200)}}, tmp_path / "hps.pt")
    (tmp_path / "hps.pt").write_bytes((tmp_path / "hps.pt").read_bytes()[:50])
    with pytest.raises(UserError, match="broken"):
        load_hps(tmp_path, **settings)


def test_nouns_are_found_by_their_tokens(folders):
    reward = load_gdino(folders["gdino"])
    nouns = ["car", "teddy bear", "computer mouse pad"]
    text = reward.tokenizer("car. teddy bear. computer mouse pad.", return_offsets_mapping=True, return_tensors="pt")
    words = [
        reward.tokenizer.convert_ids_to_tokens(text.input_ids[0][part].tolist())
        for part in spans(nouns, text.offset_mapping[0])
    ]
    assert words == [["car"], ["teddy", "bear"], ["computer", "mouse", "pad"]]


def test_boxes_go_to_their_best_noun(folders):
    """Against the model's own output, looked up word by word in float64."""
    reward = load_gdino(folders["gdino"], box_threshold=0.6)
    nouns = [["car", "teddy bear"], ["dog"]]
    ours = reward.detect(IMAGES[:2], nouns)
    model = reward.model.double()
    for image, row, mine in zip(IMAGES, nouns, ours):
        text = reward.tokenizer(". ".join(row) + ".", return_tensors="pt")
        words = reward.tokenizer.convert_ids_to_tokens(text.input_ids[0].tolist())
        pictures = reward.image_processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            output = model(pixel_values=pictures["pixel_values"].double(), pixel_mask=pictures["pixel_mask"], **text)
        tokens = [[words.index(word) for word in noun.split()] for noun in row]
        scores = torch.stack([output.logits[0][:, indices].sigmoid().amax(-1) for indices in tokens], 1)
        best, label = scores.max(1)
        order = [number for number in best.argsort(descending=True).tolist() if best[number] > 0.6]
        assert 0 < len(order) < 12 and mine.labels.tolist() == label[order].tolist()
        torch.testing.assert_close(mine.boxes.double(), output.pred_boxes[0][order], rtol=1e-3, atol=1e-4)


def test_a_noun_of_three_words_is_never_found_by_the_released_scorer(folders):
    nouns = [["computer mouse pad", "car"]]
    scorers = [load_gdino(folders["gdino"], compat=compat) for compat in ("paper", "released")]
    paper, released = (scorer.detect(IMAGES[:1], nouns)[0] for scorer in scorers)
    assert 0 in paper.labels.tolist() and 0 not in released.labels.tolist() and 1 in released.labels.tolist()


def test_git_is_asked_for_phrases_and_says_nothing_about_places_and_counts(folders):
    assert [phrases_of(meta) for meta in METAS] == [["red car", "blue dog"], [], [], ["traffic light"]]
    reward = load_git(folders["git"])
    total = reward(ROLLOUT).total
    shares = reward.ask(IMAGES[[0, 0]], ["red car?", "blue dog?"])
    assert total[0] == pytest.approx(float(shares.mean())) and total[1] == total[2] == 0.0
    nothing = SimpleNamespace(images=IMAGES[:1], prompts=[Prompt("0", "x", "", {"nouns": [], "task_type": "non"})])
    assert reward(nothing).total.tolist() == [1.0]


def test_git_reads_the_word_after_the_question(folders):
    reward = load_git(folders["git"])
    ours = reward.ask(IMAGES[:3], ["red car?", "a dog?", "traffic light?"])
    model = reward.model.double()
    for row, question in enumerate(["red car?", "a dog?", "traffic light?"]):
        words = reward.tokenizer(question, add_special_tokens=False).input_ids
        ids = torch.tensor([[reward.tokenizer.cls_token_id, *words]])
        pixels = reward.image_processor(images=[IMAGES[row]], return_tensors="pt")["pixel_values"].double()
        with torch.no_grad():
            p = model(input_ids=ids, pixel_values=pixels).logits[0, -1].softmax(-1)
        yes, no = (p[reward.tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
        assert float(ours[row]) == pytest.approx(float(yes / (yes + no)), abs=1e-5)


def test_the_orm_sees_what_transformers_own_forward_sees(folders):
    """Image placeholders spelled out in the ids and pixels handed to the model, in place of
    embeddings put together by us."""
    reward = load_orm(folders["orm"])
    ours, model, words = reward(ROLLOUT).total, reward.model.double(), reward.tokenizer
    for row in range(4):
        pictures = reward.image_processor(images=[IMAGES[row]], return_tensors="pt")
        sizes = {"pixel_values": pictures["pixel_values"].double(), "image_sizes": pictures["image_sizes"]}
        count = len(model.get_image_features(**sizes, return_dict=True).pooler_output[0])
        text = TEMPLATE.format(image="<image>" * count, question=QUESTION.format(prompt=TEXTS[row]))
        with torch.no_grad():
            p = model(**words(text, return_tensors="pt"), **sizes).logits[0, -1].softmax(-1)
        yes, no = (p[words.convert_tokens_to_ids(word)] for word in ("yes", "no"))
        assert float(ours[row]) == pytest.approx(float(yes / (yes + no)), abs=1e-5)


def test_the_released_orm_is_sharpened(folders):
    paper, released = (load_orm(folders["orm"], compat=compat)(ROLLOUT).total for compat in ("paper", "released"))
    odds = (paper / (1 - paper)) ** (1 / 0.3)
    torch.testing.assert_close(released, odds / (1 + odds))


def test_yes_share_needs_numbers_and_survives_extremes():
    logits = torch.tensor([[0.0, -1e4, -2e4], [0.0, 3.0, 3.0]])
    assert yes_share(logits, 1, 2).tolist() == [1.0, 0.5]
    with pytest.raises(UserError, match="not finite"):
        yes_share(torch.tensor([[0.0, float("-inf"), 0.0]]), 1, 2)


@pytest.mark.parametrize(
    ("load", "kind", "settings", "named"),
    [
        (load_gdino, "gdino", {"compat": "mine"}, "paper, released"),
        (load_orm, "orm", {"compat": "mine"}, "paper, released"),
        (load_orm, "orm", {"question": "does it match?"}, "{prompt}"),
        (load_orm, "orm", {"yes_word": "affirmative answer"}, "no single token"),
        (load_hps, "hps", {"file": "x.pt"}, "reward.processor"),
        (load_git, "git", {"dtype": "float99"}, "dtype"),
    ],
)
def test_options_that_cannot_be_are_one_line(folders, load, kind, settings, named):
    with pytest.raises(UserError) as error:
        load(folders[kind], **settings)
    assert named in str(error.value) and "\n" not in str(error.value)


class Fixed(Reward):
    def __init__(self, *values: float):
        self.values = values

    def __call__(self, rollout) -> RewardOutput:
        return RewardOutput(torch.tensor(self.values, dtype=torch.float64))


def test_the_sum_is_weighted_and_can_be_normalised_by_group():
    parts = {"a": Fixed(0.1, 0.2, 0.3, 0.5), "b": Fixed(1.0, 0.0, 1.0, 1.0)}
    plain = WeightedSum(parts, {"a": 2.0, "b": 0.5})(Sized())
    assert plain.total.tolist() == pytest.approx([0.7, 0.4, 1.1, 1.5])
    assert plain.parts["a"].tolist() == [0.1, 0.2, 0.3, 0.5]
    even = WeightedSum(parts, {"a": 1.0, "b": 1.0}, normalize="group", eps=0.0 + 1e-12)(Sized()).total
    half = 0.5**0.5
    assert even.tolist() == pytest.approx([0.0, 0.0, -half, half], abs=1e-6)


def test_the_sum_tells_what_its_parts_need(folders):
    total = WeightedSum({"gdino": load_gdino(folders["gdino"]), "length": Length()}, {"gdino": 1, "length": 0})
    assert total.needs_images and total.needs_plans and total.needs_meta == ("nouns",)
    for weights in ({"gdino": 1.0}, {"gdino": 1.0, "length": 1.0, "more": 1.0}):
        with pytest.raises(UserError, match="a weight for each part"):
            WeightedSum({"gdino": total.parts["gdino"], "length": Length()}, weights)
    assert WeightedSum({"a": Fixed(1.0), "b": None}, {"a": 1.0, "b": None}).parts.keys() == {"a"}
