"""Pictures inside a page, small enough for many of them; the whole picture stays a link away."""

import base64
import io
import os
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from t2i_rl.core.files import read_bytes
from t2i_rl.core.pixels import read_image

QUALITY = 80  # of JPEG
PIXELATED = 128  # a picture of at most so many pixels a side is enlarged without smoothing


class Bounds(NamedTuple):
    """Pixels a side, and bytes above which a file is not embedded as it stands."""

    side: int
    bytes: int


PICTURE = Bounds(256, 32_000)
FIGURE = Bounds(1400, 128_000)  # curves, and strips of pictures with captions


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image with at most `side` pixels a side."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def embedded(path: Path, bounds: Bounds = PICTURE) -> tuple[str, Image.Image]:
    """A picture as a `data:` address, within bounds, and itself: a small PNG as it stands, else scaled and as JPEG.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_bytes(path)
    image = read_image(content, str(path))
    if max(image.size) <= bounds.side and len(content) <= bounds.bytes and Path(path).suffix == ".png":
        return _address("png", content), image
    image, buffer = shrunk(image, bounds.side), io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY)
    return _address("jpeg", buffer.getvalue()), image


def picture_html(path: Path, folder: Path, alt: str, bounds: Bounds = PICTURE) -> str:
    """A picture within bounds that links to its file, seen from the folder that the page lies in."""
    address, image = embedded(path, bounds)
    style = " class=pixels" if max(image.size) <= PIXELATED else ""
    link = quote(Path(os.path.relpath(path, folder)).as_posix())
    return f'<a href="{link}"><img{style} alt="{escape(alt)}" src="{address}"></a>'


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
