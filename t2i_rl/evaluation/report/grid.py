"""Captioned grids of images as one picture, for the README and for the samples logged during training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import read_image, write_png
from t2i_rl.evaluation.records import headline_comparison, image_path, read_results, read_stage

FONT_SIZE = 12
LINE_HEIGHT = 15
MARGIN = 10
BORDER = 3
INK, PAPER, FRAME = "#1f2328", "#ffffff", "#d0d7de"
RIGHT, WRONG = "#1a7f37", "#cf222e"


def caption_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int,
    scale: int,
    frames: Sequence[str] | None = None,
) -> Image.Image:
    """Images in rows of `columns`, enlarged without smoothing, each in a coloured frame with its caption below.

    Args:
        images: N arrays (H, W, 3) uint8, all of one size.
        captions: N texts; line breaks are kept.
        columns: images per row.
        scale: whole-number enlargement.
        frames: N colours; grey where not given.

    Raises:
        ValueError: no images, differing sizes, or numbers of captions or frames that do not fit.
    """
    frames = frames or [FRAME] * len(images)
    if not images or len({image.shape for image in images}) > 1 or not len(images) == len(captions) == len(frames):
        raise ValueError(
            f"{len(images)} images, {len(captions)} captions, {len(frames)} frames: not one each, or not one size"
        )
    font = ImageFont.load_default(size=FONT_SIZE)
    height, width = images[0].shape[0] * scale + 2 * BORDER, images[0].shape[1] * scale + 2 * BORDER
    wrapped = [[part for line in text.split("\n") for part in wrap(line, width, font)] for text in captions]
    starts = range(0, len(images), columns)
    row_heights = [height + 4 + LINE_HEIGHT * max(map(len, wrapped[start : start + columns])) for start in starts]
    across = MARGIN + min(columns, len(images)) * (width + MARGIN)
    canvas = Image.new("RGB", (across, MARGIN + sum(row_heights) + MARGIN * len(row_heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for start, row_height in zip(starts, row_heights, strict=True):
        for column, index in enumerate(range(start, min(start + columns, len(images)))):
            left = MARGIN + column * (width + MARGIN)
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=frames[index])
            enlarged = images[index].repeat(scale, axis=0).repeat(scale, axis=1)
            canvas.paste(Image.fromarray(enlarged), (left + BORDER, top + BORDER))
            for line, text in enumerate(wrapped[index]):
                draw.text((left, top + height + 4 + line * LINE_HEIGHT), text, INK, font)
        top += row_height + MARGIN
    return canvas


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines of text of at most `width` pixels; a word that is wider than that falls apart."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        while font.getlength(f"{line} {word}" if line else word) > width:
            if line:
                lines.append(line)
                line = ""
                continue
            fitting = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            if fitting == len(word):
                break
            lines.append(word[:fitting])
            word = word[fitting:]
        line = f"{line} {word}" if line else word
    return [*lines, line] if line else lines


def first_of_each_task(records: Sequence[dict], per_task: int) -> list[tuple[str, int]]:
    """(prompt_id, sample_index) of the first `per_task` prompts of every task, first sample: chosen without looking."""
    chosen: dict[str, dict[str, int]] = {}
    for record in records:
        prompts = chosen.setdefault(record["tag"], {})
        if record["prompt_id"] not in prompts and len(prompts) < per_task:
            prompts[record["prompt_id"]] = record["sample_index"]
    return [key for prompts in chosen.values() for key in prompts.items()]


def grid_png(run_dir: Path, path: Path, per_task: int = 2, pairs_per_row: int = 2, scale: int = 5) -> None:
    """Write a PNG of before and after: same prompts and seeds side by side, framed green or red by the strict verdict.

    Raises:
        UserError: the run has no before and after, or its records are missing.
    """
    run_dir = Path(run_dir)
    comparison = headline_comparison(read_results(run_dir / "results.json"))
    if comparison is None:
        raise UserError(f"{run_dir} has no before and after: nothing was trained in it")
    before, after = comparison["a"], comparison["b"]
    records = {stage: read_stage(run_dir, stage) for stage in (before, after)}
    images, captions, frames = [], [], []
    for key in first_of_each_task(list(records[before].values()), per_task):
        for name, stage in (("before", before), ("after", after)):
            record = records[stage][key]
            images.append(np.asarray(read_image(image_path(run_dir, stage, record))))
            captions.append(f"{name}: {record['prompt']}")
            frames.append(RIGHT if record["strict"] else WRONG)
    grid = caption_grid(images, captions, 2 * pairs_per_row, scale, frames)
    write_png(path, grid)
