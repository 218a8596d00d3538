"""One reader of images: what a viewer shows, and one line where there is nothing to show."""

import io
import struct
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from t2i_rl.core import pixels
from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import read_image, square
from t2i_rl.methods.irg.files import load_trajectory, save_trajectory
from t2i_rl.methods.irg.toy_format import png, segments_of
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.models.autoregressive.segments import Segment
from t2i_rl.tasks.judge import read_canvas

WHITE = (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def raw_png(width: int, depth: int, color_type: int, row: bytes, key: bytes) -> bytes:
    """A PNG of one row whose colour `key` is transparent, at a depth that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def colours(content: bytes) -> list[tuple[int, int, int]]:
    return [tuple(pixel) for pixel in np.asarray(read_image(content, "x")).reshape(-1, 3).tolist()]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(kind, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that undo what a viewer does
    image = Image.fromarray(upright)
    stored = image if orientation == 1 else image.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    shown = np.asarray(read_image(saved(stored, kind, exif=exif, **options), "x"))
    assert shown.shape == upright.shape and np.abs(shown.astype(int) - upright).max() < 8


def test_what_lies_under_transparency_is_not_seen():
    hidden = (255, 0, 255, 0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 255, 10, 20, 30] + [0] * 762)
    palette.putpixel((1, 0), 1)
    rgba = Image.new("RGBA", (2, 1), hidden)
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    assert colours(saved(rgba)) == colours(saved(rgba, "WEBP", lossless=True)) == [WHITE, (10, 20, 30)]
    assert colours(saved(palette, transparency=0)) == [WHITE, (10, 20, 30)]
    assert colours(saved(palette, transparency=b"\0\xff")) == [WHITE, (10, 20, 30)]
    assert colours(saved(palette, "GIF", transparency=0)) == [WHITE, (10, 20, 30)]
    assert colours(saved(palette.convert("RGB"), transparency=(255, 0, 255))) == [WHITE, (10, 20, 30)]
    assert colours(saved(Image.new("LA", (2, 1), (40, 0)))) == [WHITE, WHITE]
    assert colours(saved(Image.new("LA", (1, 1), (0, 128)))) == [(127, 127, 127)]
    assert colours(saved(Image.new("L", (1, 1), 40), transparency=40)) == [WHITE]
    assert colours(saved(Image.new("1", (1, 1), 0), transparency=0)) == [WHITE]


def test_a_transparent_colour_counts_in_the_files_own_depth():
    deep = struct.pack(">HHHHHH", 0x1234, 0x5678, 0x9ABC, 0x3412, 0x7856, 0xBC9A)
    assert colours(raw_png(2, 16, 2, deep, deep[:6])) == [WHITE, (0x34, 0x78, 0xBC)]
    assert colours(raw_png(2, 16, 0, struct.pack(">HH", 0x4000, 0x4001), struct.pack(">H", 0x4000)))[0] == WHITE
    assert colours(raw_png(2, 16, 0, struct.pack(">HH", 0x4000, 0x4001), struct.pack(">H", 0x4000)))[1] == (64,) * 3
    assert colours(raw_png(2, 4, 0, b"\x56", b"\0\5")) == [WHITE, (6 * 17,) * 3]
    assert colours(raw_png(2, 2, 0, b"\x60", b"\0\1")) == [WHITE, (170,) * 3]


def test_deep_grey_is_scaled_and_what_has_no_white_is_refused():
    grey = np.array([[0, 0x4000, 65535]], np.uint16)
    expected = [(0, 0, 0), (64, 64, 64), WHITE]
    assert colours(saved(Image.fromarray(grey))) == colours(saved(Image.fromarray(grey), "TIFF")) == expected
    assert colours(saved(Image.fromarray(grey), "TIFF", tiffinfo={262: 0})) == expected[::-1][:1] + [
        (191,) * 3,
        (0,) * 3,
    ]
    assert colours(b"P5 3 1 65535\n" + grey.astype(">u2").tobytes()) == expected
    for kind in (np.int32, np.float32):
        with pytest.raises(UserError, match="x.tif .*does not say what white is"):
            read_image(saved(Image.fromarray(np.ones((2, 2), kind)), "TIFF"), "x.tif")
    assert colours(saved(Image.new("CMYK", (1, 1), (0, 0, 0, 0)), "TIFF")) == [WHITE]
    assert colours(saved(Image.new("1", (1, 1), 1))) == [WHITE]


def test_the_first_of_several_frames_is_taken_and_said_once(capsys, monkeypatch):
    monkeypatch.setattr(pixels, "_animated", [])
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = saved(red, kind, save_all=True, append_images=[blue], **options)
        assert colours(content)[0] == (255, 0, 0) and np.asarray(read_image(content, kind)).shape == (8, 8, 3)
    assert capsys.readouterr().out == "x has several frames: the first is taken, as of every such file\n"
    pixels._animated.clear()
    read_image(saved(red), "y")
    read_image(saved(red, "MPO", save_all=True, append_images=[blue]), "y")  # a telephone's photo with its preview
    assert capsys.readouterr().out == ""


def test_a_png_may_tell_a_long_story():
    story = PngImagePlugin.PngInfo()
    story.add_text("workflow", "x" * (2 << 20), zip=True)
    assert colours(saved(Image.new("RGB", (1, 1), (1, 2, 3)), pnginfo=story)) == [(1, 2, 3)]


@cache
def unreadable() -> dict[str, bytes]:
    photo = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)), "JPEG")
    picture = saved(Image.new("RGB", (32, 32), "red"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    return {
        "nothing": b"",
        "text": b"no picture",
        "a cut photo": photo[: len(photo) // 2],
        "a cut PNG": picture[:-30],
        "a broken PNG": picture[:37] + b"\xff\xff\xff\xff" + picture[41:],
        "a bomb": saved(Image.new("1", (14_000, 14_000))),
        "a program": postscript,
    }


@pytest.mark.parametrize("name", unreadable())
def test_what_cannot_be_read_is_one_line_that_names_it(name, tmp_path):
    content, path = unreadable()[name], tmp_path / "a.png"
    path.write_bytes(content)
    for source, called in ((content, "row 3"), (path, None)):
        with pytest.raises(UserError) as error:
            read_image(source, called)
        message = str(error.value)
        assert message.startswith(called or str(path)) and "cannot be read as an image: " in message
        assert "\n" not in message and "0x" not in message and "object at" not in message
        assert name != "a program" or "EPS is a program, which is not run" in message


def test_what_is_no_file_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none.png", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(UserError, match="cannot be read|does not exist"):
            read_image(path)
    (tmp_path / "half.png").write_bytes(saved(Image.new("RGB", (32, 32)))[:-30])
    with pytest.raises(UserError, match="half.png cannot be read"):
        read_canvas(str(tmp_path / "half.png"))


def test_pictures_of_trajectories_go_the_same_way(tmp_path):
    save_trajectory(
        tmp_path, Trajectory((Segment("prompt", text="a"), Segment("draw", image=np.zeros((8, 8, 3), np.uint8))))
    )
    (tmp_path / "turn1.png").write_bytes(saved(Image.new("RGBA", (8, 8), (255, 0, 255, 0))))
    assert (load_trajectory(tmp_path).images[0] == 255).all()
    (tmp_path / "turn1.png").write_bytes(b"")
    with pytest.raises(UserError, match="turn1.png cannot be read"):
        load_trajectory(tmp_path)
    text = (tmp_path / "trajectory.json").read_text()
    for old, new in (
        ('"turn1.png"', "5"),
        ('"segments": [', '"segments": 5, "rest": ['),
        ('"text": "a"', '"text": ["a"]'),
    ):
        (tmp_path / "trajectory.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match="trajectory.json: "):
            load_trajectory(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "conversation is not JSON"),
        ("[" * 100_000, "conversation is not JSON"),
        ('[{"role": "user", "content": "a\\ud83d"}]', "turn 0: content holds half of a character"),
        (
            '[{"role": "assistant", "content": [{"type": "text", "content": "a\\u0000"}]}]',
            "part 0: content holds a NUL",
        ),
    ],
)
def test_a_row_of_trajectories_that_is_no_text_is_named(text, said):
    with pytest.raises(UserError) as error:
        segments_of(text, "shard: row 3")
    assert str(error.value).startswith("shard: row 3") and said in str(error.value)


def test_a_sliver_is_cut_before_it_is_enlarged():
    sliver = np.zeros((1, 30_000, 3), np.uint8)
    sliver[:, 14_990:15_010] = (255, 0, 0)
    assert (square(Image.fromarray(sliver), 8) == (255, 0, 0)).all()
    assert len(png(square(Image.fromarray(sliver), 512))) > 0
