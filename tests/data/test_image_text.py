"""Pairs from a disk in every layout, the order they come in, and encodings that are what encoding
on the fly gives."""

import io
import json
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import square
from t2i_rl.data.encodings import EncodedPairs, Encodings
from t2i_rl.data.image_text import ImageText, ImageTextStream
from t2i_rl.data.pairs import PixelPairs
from t2i_rl.data.preferences import Preferred
from t2i_rl.data.sources import find_source
from t2i_rl.methods.pairs.agsm import AGSM
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from t2i_rl.tasks import encode
from tests.support.small_diffusers import pipeline

COUNT = 9


def picture(number: int) -> Image.Image:
    """Tells its number by its colour; some wide, some tall."""
    size = (40, 32) if number % 2 else (32, 48)
    return Image.new("RGB", size, (20 * number, 255 - 20 * number, 100))


def content(number: int) -> bytes:
    held = io.BytesIO()
    picture(number).save(held, "PNG")
    return held.getvalue()


def texts(number: int) -> list[str]:
    return [f"picture {number}", f"a  picture of number {number}"][: 1 + number % 2]


def make(layout: str, folder: Path) -> Path:
    folder.mkdir()
    if layout == "coco":
        (folder / "annotations").mkdir()
        (folder / "train2017").mkdir()
        rows = [(n, text) for n in range(COUNT) for text in texts(n)]
        table = {
            "images": [{"id": 100 + n, "file_name": f"{n:012d}.png"} for n in range(COUNT)],
            "annotations": [{"id": i, "image_id": 100 + n, "caption": text} for i, (n, text) in enumerate(rows)],
        }
        (folder / "annotations/captions_train2017.json").write_text(json.dumps(table))
        for n in range(COUNT):
            (folder / f"train2017/{n:012d}.png").write_bytes(content(n))
    elif layout in ("folder", "metadata"):
        for n in range(COUNT):
            (folder / f"{n:03d}.png").write_bytes(content(n))
            if layout == "folder":
                (folder / f"{n:03d}.txt").write_text("\n".join(texts(n)) + "\n")
        if layout == "metadata":
            lines = [json.dumps({"file_name": f"{n:03d}.png", "text": texts(n)}) for n in range(COUNT)]
            (folder / "metadata.jsonl").write_text("\n".join(lines))
    elif layout == "webdataset":
        for shard in range(2):
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
                for n in range(shard * 5, min(COUNT, shard * 5 + 5)):
                    words = (
                        ("txt", "\n".join(texts(n)).encode())
                        if n % 2
                        else ("json", json.dumps({"caption": texts(n)}).encode())
                    )
                    for suffix, data in (("png", content(n)), words):
                        member = tarfile.TarInfo(f"{n:05d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    elif layout == "parquet":
        for shard in range(2):
            numbers = range(shard * 5, min(COUNT, shard * 5 + 5))
            table = pa.table(
                {
                    "image": [{"bytes": content(n), "path": None} for n in numbers],
                    "captions": [texts(n) for n in numbers],
                }
            )
            pq.write_table(table, folder / f"{shard}.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("layout", ["coco", "folder", "metadata", "webdataset", "parquet"])
def test_every_layout_gives_the_same_pairs(layout, tmp_path):
    source = find_source(str(make(layout, tmp_path / layout)), "auto", "train2017")
    assert len(source) == COUNT
    for n in (7, 0, 8, 3):
        assert source.captions[n] == [" ".join(text.split()) for text in texts(n)]
        assert np.array_equal(np.asarray(source.image(n)), np.asarray(picture(n)))


def test_what_is_wrong_with_a_data_set_is_one_line(tmp_path):
    def refused(words: str, path: Path, layout: str = "auto"):
        with pytest.raises(UserError, match=words):
            find_source(str(path), layout, "train2017")

    refused("no such folder", tmp_path / "nowhere")
    refused("layout", make("folder", tmp_path / "a"), "zip")
    (tmp_path / "a/003.txt").unlink()
    refused("003.png has no caption", tmp_path / "a")
    (tmp_path / "a/003.txt").write_text(" \n")
    refused("003.txt: the caption is empty", tmp_path / "a")
    (make("coco", tmp_path / "c") / f"train2017/{2:012d}.png").unlink()
    refused(f"{2:012d}.png is named", tmp_path / "c")
    refused("annotations/captions_train2017.json", tmp_path / "a", "coco")
    (make("metadata", tmp_path / "m") / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": "x"}\n{"text": "y"}\n'
    )
    refused("metadata.jsonl:2", tmp_path / "m")
    (make("webdataset", tmp_path / "w") / "00001.tar").write_bytes(b"no tar" * 200)
    refused("00001.tar", tmp_path / "w")
    (make("parquet", tmp_path / "p") / "1.parquet").write_bytes(b"none")
    refused("1.parquet", tmp_path / "p")
    pq.write_table(pa.table({"picture": [b"x"], "text": ["y"]}), tmp_path / "p/1.parquet")
    refused("needed are image and text", tmp_path / "p")
    (tmp_path / "empty").mkdir()
    refused("no images with captions", tmp_path / "empty")
    (make("folder", tmp_path / "b") / "004.png").write_bytes(b"no picture")
    source = find_source(str(tmp_path / "b"), "auto", "")
    with pytest.raises(UserError, match="004.png cannot be read"):
        source.image(4)


def test_pictures_are_resized_by_their_shorter_side_and_cut_in_the_middle():
    wide = Image.new("RGB", (120, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 80, 40))
    cut = square(wide, 20)
    assert cut.shape == (20, 20, 3) and (cut == (0, 0, 255)).mean() > 0.8
    assert square(wide.transpose(Image.Transpose.ROTATE_90), 64).shape == (64, 64, 3)


def test_an_image_comes_once_an_epoch_and_no_caption_twice_in_a_batch(tmp_path):
    data = ImageText(str(make("folder", tmp_path / "d")), size=16, batch_size=4, held_out=1, seed=3)
    assert len(data.items) == COUNT - 1 and len(data.validation) == 1
    held = set(range(COUNT)) - set(data.items)
    stream = ImageTextStream(data.source, data.items, 4, 16, 3, 0, None)
    batches = [stream.batch(k) for k in range(6)]
    for epoch in range(3):
        items = [item for batch in batches[2 * epoch : 2 * epoch + 2] for item, _ in batch]
        assert sorted(items) == data.items and not held & set(items)
    assert batches[0] != batches[2]
    counts = Counter(text for k in range(100) for item, text in stream.batch(k) if item == 7 or item == 5)
    assert len(counts) >= 2 and min(counts.values()) > 10  # both captions take their turns
    later = ImageTextStream(data.source, data.items, 4, 16, 3, 5, None)
    assert later.batch(5) == batches[5]
    (tmp_path / "d/008.txt").write_text("PICTURE 0\n")
    again = ImageText(str(tmp_path / "d"), size=16, batch_size=9, held_out=0)
    with pytest.raises(UserError, match="different captions"):
        ImageTextStream(again.source, again.items, 9, 16, 0, 0, None).batch(0)
    for wrong in ({"batch_size": 1}, {"batch_size": 40}, {"held_out": 8, "batch_size": 2}):
        with pytest.raises(UserError, match="batch_size"):
            ImageText(str(tmp_path / "d"), **wrong)


MODELS = {
    "sd15": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "sd3": partial(SD3, max_sequence_length=4),
    "sd3_t5": partial(SD3, max_sequence_length=4),
}


@pytest.mark.parametrize("kind", MODELS)
def test_texts_survive_being_kept_without_their_padding(kind, tmp_path):
    model = MODELS[kind](str(pipeline(kind, tmp_path / kind)))
    text = model.encode_prompts(["a red circle", "two squares"])
    parts = model.compact(text)
    back = model.expand(parts)
    assert torch.equal(back.embeds, text.embeds)
    assert (text.pooled is None and back.pooled is None) or torch.equal(back.pooled, text.pooled)
    assert all(len(part) == 2 for part in parts.values())
    stored = sum(part.numel() for part in parts.values())
    full = text.embeds.numel() + (0 if text.pooled is None else text.pooled.numel())
    assert stored < full if kind == "sd3" else stored <= full


def encoding(tmp_path: Path, model, data: Path, **task):
    target = {
        "_target_": "t2i_rl.data.image_text.ImageText",
        "path": str(data),
        "size": 32,
        "batch_size": 2,
        "held_out": 1,
        "seed": 0,
    }
    settings = {
        "out": str(tmp_path / "enc"),
        "texts": True,
        "batch_size": 4,
        "rows_per_shard": 3,
        "part": 0,
        "parts": 1,
    } | task
    return OmegaConf.create({"data": target, "model": model, "task": settings})


@pytest.fixture
def small(tmp_path):
    model = {
        "_target_": "t2i_rl.models.diffusion.sd3.SD3",
        "path": str(pipeline("sd3", tmp_path / "sd3")),
        "max_sequence_length": 2,
    }
    return model, make("folder", tmp_path / "data")


def test_encoded_pairs_are_those_of_the_fly_and_train_the_same(small, tmp_path):
    model, folder = small
    said = encode.run(encoding(tmp_path, model, folder))
    assert said["bytes"]["images"] > 0
    sd3 = SD3(model["path"], max_sequence_length=2)
    method = AGSM(sd3, partial(torch.optim.SGD, lr=0.1))
    grids = []
    for encodings in (None, str(tmp_path / "enc")):
        data = ImageText(str(folder), size=32, batch_size=2, held_out=1, encodings=encodings)
        data.trainer = type("Trainer", (), {"lightning_module": method})
        data.setup("fit")
        grids.append(method.grid(next(iter(data.train_dataloader()))))
    fly, from_shards = grids
    torch.testing.assert_close(from_shards.x_t, fly.x_t, atol=0.03, rtol=0.02)  # bfloat16
    torch.testing.assert_close(from_shards.text.embeds, fly.text.embeds, atol=0.02, rtol=0.01)
    assert from_shards.text.embeds.shape == fly.text.embeds.shape and torch.equal(from_shards.t, fly.t)


def test_pixels_of_another_size_than_is_drawn_are_encoded_at_their_own(small):
    """SDXL and SD3 train at 512 and draw at 1024."""
    sd3 = SD3(small[0]["path"], max_sequence_length=2)
    batch = PixelPairs([0, 1], ["a", "b"], torch.rand(2, 3, 16, 16) * 2 - 1)
    x0, _ = batch.encode(sd3, [1, 2])
    assert x0.shape == (2, 4, 4, 4) and sd3.latent_shape == (4, 8, 8)
    pictures = Preferred([0, 0], ["a"], batch.pixels)
    assert torch.equal(pictures.encode(sd3, [1, 2])[0], x0)


def test_equal_captions_are_kept_once(small, tmp_path):
    model, folder = small
    for n in range(COUNT):
        (folder / f"{n:03d}.txt").write_text("always the same\n" if n < 5 else f"number {n}\n")
    encode.run(encoding(tmp_path, model, folder))
    known = json.loads((tmp_path / "enc/about.json").read_text())
    assert known["images"] == COUNT and known["texts"] == 5


def test_encodings_serve_every_seed_and_a_new_picture_is_missed_before_the_first_step(small, tmp_path):
    model, folder = small
    encode.run(encoding(tmp_path, model, folder))
    method = AGSM(SD3(model["path"], max_sequence_length=2), partial(torch.optim.SGD, lr=0.1))
    for seed in range(3):
        data = ImageText(
            str(folder), size=32, batch_size=COUNT - 3, held_out=3, seed=seed, encodings=str(tmp_path / "enc")
        )
        data.trainer = type("Trainer", (), {"lightning_module": method})
        data.setup("fit")
        assert len(next(iter(data.train_dataloader())).mean) == COUNT - 3
    picture(3).save(folder / "new.png")
    (folder / "new.txt").write_text("a new picture\n")
    data = ImageText(str(folder), size=32, batch_size=2, held_out=0, encodings=str(tmp_path / "enc"))
    data.trainer = type("Trainer", (), {"lightning_module": method})
    with pytest.raises(UserError, match="new.png.*is not among its images"):
        data.setup("fit")


def test_several_lines_of_one_image_are_captions_of_one_item(tmp_path):
    folder = make("metadata", tmp_path / "data")
    lines = [json.dumps({"file_name": f"{n:03d}.png", "text": text}) for n in range(COUNT) for text in texts(n)]
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    source = find_source(str(folder), "auto", "train2017")
    assert len(source) == COUNT == len(set(source.names))
    assert sorted(map(len, source.captions)) == sorted(len(texts(n)) for n in range(COUNT))


def first_pair(encodings: Encodings) -> EncodedPairs:
    """Of the first image and the first caption."""
    name, caption = (next(iter(encodings.places[kind])) for kind in ("images", "texts"))
    return encodings.pairs([0], [name], [caption])


def test_encoding_goes_on_after_a_kill_and_says_what_is_wrong(small, tmp_path):
    model, folder = small
    for part in (1, 0):
        encode.run(encoding(tmp_path, model, folder, part=part, parts=2))
        if part == 1:
            with pytest.raises(UserError, match="goes on"):
                Encodings.open(str(tmp_path / "enc"))
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "enc").glob("*.safetensors")}
    (tmp_path / "enc/images-00001.json").unlink()  # as if killed between a shard and its record
    (tmp_path / "enc/texts-00000.safetensors").write_bytes(b"half")
    encode.run(encoding(tmp_path, model, folder, part=1, parts=2))  # mends its own part alone
    with pytest.raises(UserError, match="has changed"):
        first_pair(Encodings.open(str(tmp_path / "enc")))
    encode.run(encoding(tmp_path, model, folder))
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "enc").glob("*.safetensors")}
    assert {name for name in before if before[name] != after[name]} == {
        "images-00001.safetensors",
        "texts-00000.safetensors",
    }
    opened = Encodings.open(str(tmp_path / "enc"))
    first_pair(opened)
    with pytest.raises(UserError, match="not among its texts"):
        opened.pairs([0], [next(iter(opened.places["images"]))], ["something else"])
    with pytest.raises(UserError, match="size=32"):
        opened.check(SD3(model["path"], max_sequence_length=2), 64)
    with pytest.raises(UserError, match="encoders_sha256"):
        opened.check(SD3(str(pipeline("sd3", tmp_path / "other", seed=5)), max_sequence_length=2), 32)
    with pytest.raises(UserError, match="text_length"):
        opened.check(SD3(model["path"], max_sequence_length=3), 32)
    with pytest.raises(UserError, match="about.json"):
        Encodings.open(str(tmp_path))
    other = encoding(tmp_path, model, folder)
    other.data.size = 16
    with pytest.raises(UserError, match="another folder"):
        encode.run(other)


def test_latents_alone_can_be_kept(small, tmp_path):
    model, folder = small
    encode.run(encoding(tmp_path, model, folder, texts=False))
    opened = Encodings.open(str(tmp_path / "enc"))
    name = next(iter(opened.places["images"]))
    batch = opened.pairs([0], [name], ["a red circle"])
    sd3 = SD3(model["path"], max_sequence_length=2)
    _, text = batch.encode(sd3, [1])
    assert batch.text is None and torch.equal(text.embeds, sd3.encode_prompts(["a red circle"]).embeds)
    one, other = batch.encode(sd3, [1])[0], batch.encode(sd3, [2])[0]
    assert not torch.equal(one, other) and batch.to("cpu").mean.dtype == torch.bfloat16
