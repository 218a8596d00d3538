"""Rewards with gradients: the differentiable path reads pictures as the published one does, and its
gradients are those of finite differences."""

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import to_bytes
from t2i_rl.core.prompts import Prompt
from t2i_rl.rewards.aesthetic import Aesthetic
from t2i_rl.rewards.clip_score import ClipScore
from t2i_rl.rewards.image_reward import ImageReward
from t2i_rl.rewards.pixels import prepared, to_unit
from t2i_rl.rewards.weighted_sum import WeightedSum
from tests.rewards.test_image_reward import HEADS, released_state
from tests.support.small_rewards import BERT, save_small_hps, tokenizer

TEXTS = ["a red car", "two cup", "a dog"]
PROMPTS = [Prompt(str(i), text, "", {}) for i, text in enumerate(TEXTS)]


def pictures(height: int = 48, width: int = 40) -> np.ndarray:
    """Smooth pictures: of noise, a resize's rounding would be the whole difference."""
    small = np.random.default_rng(0).integers(0, 255, (3, 6, 5, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(noise).resize((width, height), Image.BICUBIC)) for noise in small])


def head(width: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """The published layout: linear layers under 0, 2, 4, 6 and 7."""
    draws, state, wide = torch.Generator().manual_seed(seed), {}, width
    for layer, out in ((0, 12), (2, 8), (4, 6), (6, 4), (7, 1)):
        state[f"layers.{layer}.weight"] = torch.randn(out, wide, generator=draws)
        state[f"layers.{layer}.bias"] = torch.randn(out, generator=draws)
        wide = out
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    save_small_hps(folder / "clip")
    for seed in (0, 1):
        torch.save(head(seed=seed), folder / f"head_{seed}.pth")
    (folder / "image_reward").mkdir()
    words = tokenizer(BERT, post="[CLS] $A [SEP]")
    words.save_pretrained(folder / "bert")
    torch.save(released_state(len(words)), folder / "image_reward" / "ImageReward.pt")
    return folder


def reward_of(folder, name: str):
    if name == "clip":
        return ClipScore(str(folder / "clip"), scaled=True, device=None)
    if name == "aesthetic":
        return Aesthetic(str(folder / "clip"), str(folder / "head_0.pth"), device=None)
    if name == "image_reward":
        return ImageReward(str(folder / "image_reward"), tokenizer=str(folder / "bert"), device=None, **HEADS)
    return WeightedSum({"a": reward_of(folder, "clip"), "b": reward_of(folder, "image_reward")}, {"a": 0.05, "b": 2.0})


NAMES = ("clip", "aesthetic", "image_reward", "sum")


@pytest.mark.parametrize("name", NAMES)
def test_the_differentiable_path_reads_what_the_published_one_reads(folder, name):
    reward, images = reward_of(folder, name), pictures()
    published = reward(Pictures(images)).total
    ours = reward.score_pixels(to_unit(images), PROMPTS)
    assert ours.dtype == torch.float32 or name == "sum"
    spread = float(published.max() - published.min())
    torch.testing.assert_close(ours.double(), published.double(), rtol=0, atol=0.05 * spread + 1e-6)


class Pictures:
    def __init__(self, images):
        self.images, self.prompts, self.group_size = images, PROMPTS, 1

    def __len__(self):
        return len(self.prompts)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_pixels_and_are_right(folder, name):
    reward = reward_of(folder, name)
    pixels = (0.2 + 0.6 * to_unit(pictures())).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score_pixels(pixels, PROMPTS).sum(), pixels)
    assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()
    direction, step = gradient / gradient.norm(), 0.05
    with torch.no_grad():
        sides = [reward.score_pixels(pixels + sign * step * direction, PROMPTS).double().sum() for sign in (1, -1)]
    assert ((sides[0] - sides[1]) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("size", [(48, 40), (16, 16), (11, 30)])
def test_preparation_is_the_processors_but_for_whole_bytes(folder, size):
    processor, images = reward_of(folder, "clip").image_processor, pictures(*size)
    theirs = processor(images=list(images), return_tensors="pt")["pixel_values"]
    ours = prepared(to_unit(images), processor)
    assert ours.shape == theirs.shape
    whole_byte = 1 / 255 / min(processor.image_std)
    assert (ours - theirs).abs().max() < 2.5 * whole_byte


def test_two_heads_are_two_rewards_and_a_strange_file_is_refused(folder):
    scores = [
        Aesthetic(str(folder / "clip"), str(folder / f"head_{i}.pth"), device=None).score_pixels(
            to_unit(pictures()), None
        )
        for i in (0, 1)
    ]
    assert (scores[0] - scores[1]).abs().min() > 1e-3
    torch.save(head(width=20), folder / "other.pth")
    with pytest.raises(UserError, match="no aesthetic head for embeddings of 24"):
        Aesthetic(str(folder / "clip"), str(folder / "other.pth"), device=None)
    with pytest.raises(UserError, match="nowhere.pth"):
        Aesthetic(str(folder / "clip"), str(folder / "nowhere.pth"), device=None)


def test_the_aesthetic_head_is_the_published_one(folder):
    """Linear layers with nothing between them, on the unit embedding."""
    reward = reward_of(folder, "aesthetic")
    pixel_values = prepared(to_unit(pictures()), reward.image_processor)
    with torch.no_grad():
        embeds = reward.model.get_image_features(pixel_values=pixel_values).pooler_output
    x, state = embeds / embeds.norm(dim=-1, keepdim=True), head()
    for layer in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    torch.testing.assert_close(reward.score_pixels(to_unit(pictures()), None), x[:, 0])


def test_a_sum_has_gradients_only_where_its_parts_have(folder):
    assert reward_of(folder, "sum").differentiable
    grouped = WeightedSum({"a": reward_of(folder, "clip")}, {"a": 1.0}, normalize="group")
    assert not grouped.differentiable


def test_bytes_and_units_are_inverse():
    images = pictures()
    assert np.array_equal(to_bytes(to_unit(images)), images)
