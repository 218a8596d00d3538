"""`task=judge`: what the oracle sees in one picture, and whether it is what the prompt asks."""

from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import read_image, write_png
from t2i_rl.core.prompts import Prompt
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import ShapeDetection, detect
from t2i_rl.shapes.scene import CANVASES
from t2i_rl.shapes.text import EXTRA_TASKS, GENEVAL_TASKS, enumerate_prompts

SCALE = 8


def check(cfg) -> None:
    """Refuse to judge half of what is needed.

    Raises:
        UserError: the picture or the prompt is not given.
    """
    if not (cfg.image and cfg.prompt):
        raise UserError('task=judge takes image=<file> and prompt="three red circles"')


def run(cfg) -> dict:
    """Print the verdict and its reasons; save the picture with boxes as judged.png."""
    image, prompt = read_canvas(cfg.image), find_prompt(cfg.prompt)
    objects = detect(image[None])[0]
    verdict = judge(prompt.meta, objects)
    console = Console()
    console.print(
        f"{prompt.text!r} ({prompt.tag}): strict {verdict.strict}, lenient {verdict.lenient}, score {verdict.score:.2f}"
    )
    for item in objects:
        place, malformed = f"({item.center[0]:.1f}, {item.center[1]:.1f})", ", malformed" if item.malformed else ""
        console.print(f"  sees a {item.color} {item.shape} at {place}, match {item.score:.2f}{malformed}")
    for defect in verdict.defects:
        console.print(f"  {defect.text}")
    path = Path(cfg.paths.output_dir) / "judged.png"
    write_png(path, draw_boxes(image, objects))
    console.print(f"boxes: {path}", soft_wrap=True)
    return {
        "strict": verdict.strict,
        "lenient": verdict.lenient,
        "score": verdict.score,
        "defects": [defect.text for defect in verdict.defects],
    }


def read_canvas(path: str) -> np.ndarray:
    """An RGB picture, uint8 `(S, S, 3)`.

    Raises:
        UserError: no such file, no picture, or not a canvas of the world.
    """
    image = np.asarray(read_image(path, f"image={path}"))
    if image.shape[0] != image.shape[1] or image.shape[0] not in CANVASES:
        raise UserError(
            f"image={path} is {image.shape[1]}x{image.shape[0]}; the oracle reads squares of "
            f"{', '.join(map(str, CANVASES))} pixels"
        )
    return image


def find_prompt(text: str) -> Prompt:
    """The prompt of the world with this wording.

    Raises:
        UserError: there is none; close ones are named.
    """
    known = {prompt.text: prompt for tag in GENEVAL_TASKS + EXTRA_TASKS for prompt in enumerate_prompts(tag, size=48)}
    if text.strip() not in known:
        near = get_close_matches(
            text, [known_text for known_text in known if abs(len(known_text) - len(text)) < 8], n=3, cutoff=0.5
        )
        raise UserError(
            f"the judge does not know the prompt {text!r}"
            + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
        )
    return known[text.strip()]


def draw_boxes(image: np.ndarray, objects: list[ShapeDetection]) -> Image.Image:
    """The picture enlarged, with a box and a name on each object."""
    picture = Image.fromarray(image).resize((image.shape[1] * SCALE, image.shape[0] * SCALE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for item in objects:
        color = "#cf222e" if item.malformed else "#1a7f37"
        draw.rectangle([SCALE * edge for edge in item.box], outline=color, width=2)
        draw.text(
            (SCALE * item.box[0] + 3, SCALE * item.box[1] + 1),
            f"{item.color} {item.shape}" if not item.malformed else "malformed",
            fill=color,
        )
    return picture
