"""ImageReward against the released architecture, written out here in float64 under the released
file's own names."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.rewards.image_reward import ImageReward
from tests.support.small_rewards import BERT, tokenizer

IMAGES = np.random.default_rng(0).integers(0, 255, (3, 40, 32, 3)).astype(np.uint8)
TEXTS = ["a red car and a blue dog", "two cup", "a photo of a traffic light " * 12]
ROLLOUT = SimpleNamespace(images=IMAGES, prompts=[Prompt(str(i), text, "", {}) for i, text in enumerate(TEXTS)])
SEEN, READ, HEADS = 24, 16, {"text_heads": 2, "vision_heads": 3}


def released_state(words: int) -> dict[str, torch.Tensor]:
    """Random weights with the names and layout of `ImageReward.pt`, two layers a tower."""
    draws, state = torch.Generator().manual_seed(0), {}

    def weight(name: str, *shape: int) -> None:
        state[name] = 0.3 * torch.randn(shape, generator=draws)

    def linear(name: str, wide: int, out: int) -> None:
        weight(f"{name}.weight", out, wide)
        weight(f"{name}.bias", out)

    def norm(name: str, wide: int) -> None:
        weight(f"{name}.weight", wide)
        weight(f"{name}.bias", wide)

    eye = "blip.visual_encoder"
    weight(f"{eye}.cls_token", 1, 1, SEEN)
    weight(f"{eye}.pos_embed", 1, 5, SEEN)
    weight(f"{eye}.patch_embed.proj.weight", SEEN, 3, 8, 8)
    weight(f"{eye}.patch_embed.proj.bias", SEEN)
    norm(f"{eye}.norm", SEEN)
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", SEEN)
        norm(f"{block}.norm2", SEEN)
        linear(f"{block}.attn.qkv", SEEN, 3 * SEEN)
        linear(f"{block}.attn.proj", SEEN, SEEN)
        linear(f"{block}.mlp.fc1", SEEN, 40)
        linear(f"{block}.mlp.fc2", 40, SEEN)
    ear = "blip.text_encoder"
    state[f"{ear}.embeddings.position_ids"] = torch.arange(48)[None]
    weight(f"{ear}.embeddings.word_embeddings.weight", words, READ)
    weight(f"{ear}.embeddings.position_embeddings.weight", 48, READ)
    norm(f"{ear}.embeddings.LayerNorm", READ)
    for i in range(2):
        layer = f"{ear}.encoder.layer.{i}"
        for kind, wide in (("attention", READ), ("crossattention", SEEN)):
            linear(f"{layer}.{kind}.self.query", READ, READ)
            linear(f"{layer}.{kind}.self.key", wide, READ)
            linear(f"{layer}.{kind}.self.value", wide, READ)
            linear(f"{layer}.{kind}.output.dense", READ, READ)
            norm(f"{layer}.{kind}.output.LayerNorm", READ)
        linear(f"{layer}.intermediate.dense", READ, 32)
        linear(f"{layer}.output.dense", 32, READ)
        norm(f"{layer}.output.LayerNorm", READ)
    for i, (wide, out) in {0: (READ, 12), 2: (12, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}.items():
        linear(f"mlp.layers.{i}", wide, out)
    weight("blip.vision_proj.weight", 7, SEEN)  # other heads of the pretrained BLIP are in the file too
    return state


def released_score(state: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor) -> float:
    """One picture `(3, H, W)` and the tokens `(N,)` of its text, unpadded, through the released
    graph, in float64."""
    state = {name: value.double() for name, value in state.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    eye, ear = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(
        pixels[None].double(),
        state[f"{eye}.patch_embed.proj.weight"],
        state[f"{eye}.patch_embed.proj.bias"],
        stride=8,
    )
    x = torch.cat([state[f"{eye}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{eye}.pos_embed"][0]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        parts = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*parts, HEADS["vision_heads"]))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    image_states = norm(f"{eye}.norm", x, 1e-6)
    y = state[f"{ear}.embeddings.word_embeddings.weight"][ids]
    positions = state[f"{ear}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(f"{ear}.embeddings.LayerNorm", y + positions, 1e-12)
    for i in range(2):
        layer = f"{ear}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            keys = y if kind == "attention" else image_states
            parts = [
                linear(f"{layer}.{kind}.self.{name}", z) for name, z in (("query", y), ("key", keys), ("value", keys))
            ]
            mixed = linear(f"{layer}.{kind}.output.dense", attend(*parts, HEADS["text_heads"]))
            y = norm(f"{layer}.{kind}.output.LayerNorm", y + mixed, 1e-12)
        inner = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", y)))
        y = norm(f"{layer}.output.LayerNorm", y + inner, 1e-12)
    z = y[0]
    for i in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{i}", z)
    return float((z[0] - 0.16717179) / 1.0333394)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image_reward")
    words = tokenizer(BERT, post="[CLS] $A [SEP]")
    words.save_pretrained(path)
    torch.save(released_state(len(words)), path / "ImageReward.pt")
    return path


def load(folder: Path, words: Path | None = None, **settings) -> ImageReward:
    return ImageReward(str(folder), tokenizer=str(words or folder), device=None, **{**HEADS, **settings})


def test_the_score_is_the_released_graphs(folder):
    reward = load(folder, batch_size=2)
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    pixels = reward.image_processor(images=list(IMAGES), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 16, 16)
    ids = [reward.tokenizer(text, truncation=True, max_length=35).input_ids for text in TEXTS]
    assert len(ids[2]) == 35 and len(ids[1]) < 10
    expected = [released_score(state, *row) for row in zip(pixels, map(torch.tensor, ids), strict=True)]
    totals = reward(ROLLOUT).total.tolist()
    assert totals == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.01
    swapped = SimpleNamespace(images=IMAGES[::-1].copy(), prompts=ROLLOUT.prompts)
    assert reward(swapped).total.tolist() != pytest.approx(totals, abs=1e-3)


def test_another_file_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"ImageReward\.pt"):
        load(tmp_path / "nowhere", folder)
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    for missing in (
        "mlp.layers.4.weight",
        "blip.text_encoder.encoder.layer.1.output.dense.bias",
        "blip.visual_encoder.pos_embed",
    ):
        torch.save({name: value for name, value in state.items() if name != missing}, tmp_path / "ImageReward.pt")
        with pytest.raises(UserError, match="is no ImageReward") as error:
            load(tmp_path, folder)
        assert "\n" not in str(error.value)
