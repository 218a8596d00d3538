"""Images in and out: one reader for whatever a disk holds, one way to bytes for what is finite."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_bytes, replacing
from t2i_rl.core.finite import check_finite

MOST_OBLONG = 16

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
UNREADABLE = (  # what Pillow's readers raise on broken bytes, tried with 60,000 of them
    *(OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
BACKGROUND = (255, 255, 255)
WHITE = 65535  # of 16 bits
TIFF_BITS, TIFF_MEANING = 258, 262  # tags: bits a sample; 0 where the greatest number is black

# Image tools write all their settings into a PNG. What all texts of a file may hold together bounds
# an attack as well.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
OVERFLOW = (
    "the usual cause is an autoencoder in float16, which overflows (take model.dtype=bfloat16 or float32, or another "
    "model.vae); else the weights are broken"
)


def read_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """An image as a viewer shows it, in RGB.

    It is turned as its EXIF says, put over white where it is transparent, and scaled from 16 bits
    to 8. Of an animation or of several pages the first is taken, and a line says so once.

    Args:
        source: a file, or its bytes.
        name: what an error calls it, by default the file.

    Raises:
        UserError: it cannot be read, is so large that Pillow takes it for an attack, or has 32 bits
            a channel, where nothing says what white is; the line names it.
    """
    name = name or str(source)
    content = source if isinstance(source, bytes) else read_bytes(source)
    if not content:
        raise UserError(f"{name} cannot be read as an image: it is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "EPS":
                raise ValueError("EPS is a program, which is not run: save it as PNG")
            if image.format != "MPO" and getattr(image, "is_animated", False):  # Pillow: not every format has it
                _say_first_frame(name)
            return _as_shown(image)
    except UnidentifiedImageError as error:
        raise UserError(f"{name} cannot be read as an image: it is of no format that is known here") from error
    except UNREADABLE as error:
        raise UserError(f"{name} cannot be read as an image: {str(error) or type(error).__name__}") from error


_animated: list[str] = []


def _say_first_frame(name: str) -> None:
    if not _animated:
        print(f"{name} has several frames: the first is taken, as of every such file", flush=True)
        _animated.append(name)


def _as_shown(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    _scale_colour_key(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")
    return image.convert("RGB")


def _scale_colour_key(image: Image.Image) -> None:
    """Scale a PNG's one transparent colour to 8 bits, as Pillow scales the pixels."""
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode == "P" or not isinstance(key, (int, tuple)):
        return
    raw_mode = image.tile[0].args  # type: ignore[attr-defined]  # an opened file has it
    if raw_mode == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)  # as Pillow cuts the pixels
    elif raw_mode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2 ** int(raw_mode[-1]) - 1)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as RGB.

    Raises:
        ValueError: it has 32 bits, or fractions.
    """
    scaled_by_pillow = image.mode == "I" and image.format in ("PPM", "PNG")  # these have 16 bits, whatever the mode
    if not (image.mode.startswith("I;16") or scaled_by_pillow):
        raise ValueError("grey of 32 bits or of fractions does not say what white is: save it with 8 or 16 bits")
    white, inverted = WHITE, False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]  # an opened TIFF has them
        white = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
        inverted = tags.get(TIFF_MEANING) == 0
    key = image.info.get("transparency")
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.float64)
    grey = np.rint((white - values if inverted else values) * 255 / white).astype(np.uint8)
    if key is not None:
        grey[values == key] = BACKGROUND[0]
    return Image.fromarray(grey).convert("RGB")


def write_png(path: str | Path, image: Image.Image | np.ndarray) -> None:
    """Write an image (Pillow's, or uint8 `(H, W, 3)`) whole or not at all."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with replacing(path, durable=False) as temporary:
        image.save(temporary, format="PNG")


def to_bytes(pixels: torch.Tensor, centred: bool = False) -> np.ndarray:
    """float `(B, 3, H, W)` in [0, 1] -> uint8 `(B, H, W, 3)`.

    This is the one way to bytes for whatever a model draws.

    Args:
        centred: the values are in [-1, 1], as autoencoders give them.

    Raises:
        UserError: a pixel is not finite: as bytes it would be black, and be scored.
    """
    pixels = pixels.detach()
    check_finite(pixels, "the pixels that the model drew", OVERFLOW)
    scaled = (pixels + 1) * 127.5 if centred else pixels * 255
    return scaled.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 `(size, size, 3)`: the shorter side resized to `size` (bicubic), the middle cut out."""
    if max(image.size) > MOST_OBLONG * min(image.size):
        image = _shortened(image)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _shortened(image: Image.Image) -> Image.Image:
    """The middle of a sliver: one of 1 x 10,000 pixels, enlarged whole, would fill the memory."""
    length = MOST_OBLONG * min(image.size)
    width, height = (min(side, length) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
