"""How well the oracle reads, and how often it accepts what is wrong.

It reads clean renders, noise, blur, JPEG and janus_tiny's VQ reconstruction.

python experiments/oracle/robustness.py        # writes docs/oracle.md
"""

import io
import textwrap
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.stats import wilson
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.shapes import oracle
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.render import render, to_pixels
from t2i_rl.shapes.scene import sample_scene
from t2i_rl.shapes.suites import wishes
from t2i_rl.shapes.text import EXTRA_TASKS, GENEVAL_TASKS, enumerate_prompts

ROOT = Path(__file__).parents[2]
SEED, PER_TASK = 0, 400


def drawn(tag: str, size: int, count: int = PER_TASK):
    """Prompts and the clean images of scenes that satisfy them."""
    rng = np.random.default_rng((SEED, size, len(tag)))
    pool = list(enumerate_prompts(tag, size))
    prompts = [pool[i] for i in rng.integers(0, len(pool), count)]
    return prompts, np.stack([render(sample_scene(wishes(prompt), rng, size)) for prompt in prompts])


def hits(prompts, images) -> int:
    return sum(judge(prompt.meta, found).strict for prompt, found in zip(prompts, detect(images), strict=True))


def noise(sigma: float):
    return lambda images: np.clip(images + np.random.default_rng(SEED).normal(0, sigma, images.shape), 0, 255).astype(
        np.uint8
    )


def blur(images: np.ndarray) -> np.ndarray:
    padded = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    return np.rint(sum(padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9).astype(
        np.uint8
    )


def jpeg(quality: int):
    def encode(image: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
        return np.asarray(Image.open(buffer).convert("RGB"))

    return lambda images: np.stack([encode(image) for image in images])


def vq_reconstruction():
    chat = {"system": "", "instruction": "describe the picture: {prompt}"}
    janus = Janus(str(ROOT / "t2i_rl" / "weights" / "janus_tiny"), chat)

    def reconstruct(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            codes = torch.cat(
                [nearest_codes(janus.model.model.vqmodel, to_pixels(part)) for part in np.array_split(images, 8)]
            )
        return np.concatenate([janus.decode(part) for part in codes.chunk(8)])

    return reconstruct


def cell(count: int, n: int) -> str:
    share = wilson(count, n)
    return f"{100 * share['mean']:.2f} [{100 * share['low']:.2f}, {100 * share['high']:.2f}]"


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    lines = [
        "## Clean renders",
        "",
        f"Strict verdict on images that satisfy their prompt, {PER_TASK} a task, percent with Wilson's 95 % interval.",
        "",
    ]
    lines += ["| task | 32 px | 48 px | 64 px |", "|---|--:|--:|--:|"]
    totals = {32: 0, 48: 0, 64: 0}
    for tag in GENEVAL_TASKS + EXTRA_TASKS:
        row = []
        for size in totals:
            if tag in ("texture", "size") and size == 32:
                row.append("-")
                continue
            count = hits(*drawn(tag, size))
            totals[size] += count * (tag in GENEVAL_TASKS)
            row.append(cell(count, PER_TASK))
        lines.append(f"| {tag} | " + " | ".join(row) + " |")
    n = PER_TASK * len(GENEVAL_TASKS)
    lines.append(
        f"| **six GenEval tasks, n={n}** | " + " | ".join(f"**{cell(totals[size], n)}**" for size in totals) + " |"
    )

    six = {size: [drawn(tag, size) for tag in GENEVAL_TASKS] for size in (32, 64)}
    changes = {f"Gaussian noise, sigma {s}": noise(s) for s in (4, 8, 16)} | {"3x3 box blur": blur}
    changes |= {f"JPEG {q} (4:4:4)": jpeg(q) for q in (90, 75, 50)}
    lines += [
        "",
        "## Damaged images",
        "",
        f"The same images of the six tasks (n={n}), strict.",
        "",
        "| damage | 32 px | 64 px |",
        "|---|--:|--:|",
    ]
    for name, damage in changes.items():
        row = [cell(sum(hits(prompts, damage(images)) for prompts, images in six[size]), n) for size in six]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    reconstruct = vq_reconstruction()
    count = sum(hits(prompts, reconstruct(images)) for prompts, images in six[32])
    lines.append(f"| janus_tiny's VQ encoder and decoder | {cell(count, n)} | - |")

    lines += [
        "",
        "## Wrong images",
        "",
        "| image | strict accepts | lenient (GenEval's rule) accepts |",
        "|---|--:|--:|",
    ]
    for name, make in {
        "another prompt of the same task": lambda images: np.roll(images, 1, axis=0),
        "uniform noise": lambda images: np.random.default_rng(SEED).integers(0, 256, images.shape, dtype=np.uint8),
    }.items():
        verdicts = [
            judge(p.meta, f) for prompts, images in six[32] for p, f in zip(prompts, detect(make(images)), strict=True)
        ]
        lines.append(
            f"| {name} | {cell(sum(v.strict for v in verdicts), n)} | {cell(sum(v.lenient for v in verdicts), n)} |"
        )
    lines += [
        "",
        paragraph(
            '"Another prompt" includes images that do satisfy the prompt they are shown for (there are four shapes), '
            "so it is an upper bound."
        ),
    ]

    images = np.concatenate([images for _, images in six[32]])
    started = time.time()
    detect(images)
    speed = len(images) / (time.time() - started)
    head = [
        "# How well the oracle reads",
        "",
        paragraph(
            f"Made by `python experiments/oracle/robustness.py` on {date.today()}, seed {SEED}; {speed:.0f} images/s "
            f"at 32 px on {torch.get_num_threads()} CPU thread(s)."
        ),
        "",
        paragraph(
            "The oracle has no learned part (`t2i_rl/shapes/oracle.py`): foreground is what lies "
            f"{oracle.FOREGROUND:.0f} RGB units or more from the border's median; a component of fewer than "
            f"{oracle.MIN_PIXELS} pixels is a speck and ignored; one whose soft IoU with the best template is below "
            f"{oracle.MIN_IOU}, whose colour lies more than {oracle.MAX_COLOR_DISTANCE:.0f} from every palette colour, "
            f"or of whose core pixels fewer than {100 * oracle.MIN_PURITY:.0f} % are the named colour, is `malformed`, "
            "and counts as a surplus object.",
            "Everything else is named, so a well-formed object of the wrong kind is `wrong`, not `malformed`.",
        ),
        "",
    ]
    write_atomic(ROOT / "docs" / "oracle.md", "\n".join([*head, *lines, ""]))
    print((ROOT / "docs" / "oracle.md").read_text())


if __name__ == "__main__":
    main()
