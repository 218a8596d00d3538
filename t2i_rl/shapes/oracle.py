"""The oracle: reads an image back into a scene by analysis by synthesis.

It has no learned part, is deterministic, and works in batches.

Foreground is what differs from the border's median colour; each 8-connected component gets the
nearest palette colour and the template (the renderer's own stamps, over shape, texture, radius and
sub-pixel offset) with the best soft IoU. A component below `MIN_IOU`, too far from every palette
colour, or of mixed colour is `malformed`; one of fewer than `MIN_PIXELS` pixels is a speck and
ignored.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from t2i_rl.core.contracts import Detection
from t2i_rl.core.errors import UserError
from t2i_rl.shapes.render import reach, stamp
from t2i_rl.shapes.scene import BASE_SHAPES, CANVASES, COLORS, LARGE_SHAPES, SIZES, TEXTURES, radii

FOREGROUND = 50.0  # RGB distance to the background: a quarter of the palest colour's
MIN_PIXELS = 6
MIN_IOU = 0.74
MAX_COLOR_DISTANCE = 90.0
MIN_PURITY = 0.6
SHORTLIST = 12

_NAMES = tuple(COLORS)
_PALETTE = np.array([COLORS[name] for name in _NAMES], dtype=np.float32)


@dataclass(frozen=True)
class ShapeDetection(Detection):
    """One shape in an image; `score` is its soft IoU with the best template, in [0, 1].

    `malformed`: no shape fits it.
    """

    texture: str = "solid"
    size: str | None = None
    malformed: bool = False

    @property
    def shape(self) -> str:
        return self.label


@dataclass(frozen=True)
class Bank:
    """Templates `(K, S * S)` float32, and what each of them stands for.

    unit: the templates with norm 1, for the shortlist. boxes: `(K, 3)`, the centre's offset `(x,
    y)` from the patch's centre, and the half-extent.
    """

    side: int
    templates: np.ndarray
    unit: np.ndarray
    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    sizes: tuple[str | None, ...]
    boxes: np.ndarray


@cache
def template_bank(size: int) -> Bank:
    """Every stamp that a canvas of `size` pixels can hold, moved by up to a pixel in quarter steps.

    Above 32 pixels they are moved by up to two pixels in half steps.
    """
    kinds = [(shape, "solid", r, None) for shape in (BASE_SHAPES if size == 32 else LARGE_SHAPES) for r in radii(size)]
    if size == 32:
        kinds += [(shape, "solid", r, None) for shape in BASE_SHAPES for r in (4.0, 6.0)]
    else:
        kinds += [(shape, texture, r, None) for shape in BASE_SHAPES for texture in TEXTURES[1:] for r in radii(size)]
        kinds += [(shape, "solid", r, word) for shape in BASE_SHAPES for word in SIZES for r in radii(size, word)]
    half = max(reach(r) for _, _, r, _ in kinds) + 2
    offsets = np.arange(-1, 1.01, 0.25) if size == 32 else np.arange(-2, 2.01, 0.5)
    templates, boxes, labels = [], [], []
    for shape, texture, r, word in kinds:
        for dx in offsets:
            for dy in offsets:
                x, y = int(np.floor(dx)), int(np.floor(dy))
                alpha = stamp(shape, r, dx - x, dy - y, texture)
                patch = np.zeros((2 * half + 1, 2 * half + 1), dtype=np.float32)
                top, left = half + y - reach(r), half + x - reach(r)
                patch[top : top + len(alpha), left : left + len(alpha)] = alpha
                templates.append(patch.ravel())
                boxes.append((dx, dy, r))
                labels.append((shape, texture, word))
    templates = np.stack(templates)
    unit = templates / np.linalg.norm(templates, axis=1, keepdims=True)
    return Bank(2 * half + 1, templates, unit, *zip(*labels, strict=True), np.array(boxes))


def components(mask: np.ndarray) -> np.ndarray:
    """8-connected components of boolean `(N, H, W)`: distinct int labels, 0 outside.

    Each pixel takes the greatest label around it, until no label changes.
    """
    count, height, width = mask.shape
    labels = np.zeros((count, height + 2, width + 2), dtype=np.int32)
    inner = labels[:, 1:-1, 1:-1]
    inner[:] = np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape) * mask
    while True:
        former_labels = inner.copy()
        rows = np.maximum(np.maximum(labels[:, :-2], labels[:, 1:-1]), labels[:, 2:])
        inner[:] = np.maximum(np.maximum(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:]) * mask
        if np.array_equal(former_labels, inner):
            return inner.copy()


def detect(images: np.ndarray) -> list[list[ShapeDetection]]:
    """Objects in uint8 images `(N, S, S, 3)`, best first.

    Raises:
        UserError: a canvas the world does not have.
    """
    size = images.shape[1]
    if images.ndim != 4 or images.shape[2:] != (size, 3) or size not in CANVASES:
        sides = " or ".join(map(str, CANVASES))
        raise UserError(f"the shapes oracle reads {sides} pixel square images, not {images.shape[1:]}")
    bank = template_bank(size)
    pixels = images.astype(np.float32)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(border, axis=1)
    offset = pixels - background[:, None, None]
    distance = np.linalg.norm(offset, axis=-1)
    labels = components(distance > FOREGROUND)
    patches, crops = [], []
    for number in range(len(images)):
        for label in np.unique(labels[number])[1:]:
            member = labels[number] == label
            if member.sum() < MIN_PIXELS:
                continue
            core = offset[number][_core(distance[number], member)]
            color, is_pure = _color(core, _PALETTE - background[number], faintest=1.0 if size == 32 else 0.3)
            full = core.mean(axis=0) if size == 32 else _PALETTE[color] - background[number]
            patch, center = _patch(offset[number], full, member, bank.side // 2)
            patches.append(patch)
            crops.append((number, center, color, is_pure))
    best_templates = _match(np.stack(patches), bank) if patches else []
    detections: list[list[ShapeDetection]] = [[] for _ in images]
    for (number, center, color, is_pure), (template, iou) in zip(crops, best_templates, strict=True):
        item = ShapeDetection(
            label=bank.shapes[template],
            box=_box(center, *bank.boxes[template]),
            score=iou,
            color=_NAMES[color],
            texture=bank.textures[template],
            size=bank.sizes[template],
            malformed=iou < MIN_IOU or not is_pure,
        )
        detections[number].append(item)
    return [sorted(items, key=lambda item: -item.score) for items in detections]


def _box(center: tuple[int, int], dx: float, dy: float, r: float) -> tuple[float, float, float, float]:
    """`(x1, y1, x2, y2)` of a template that lies off the centre of its patch by `dx` and `dy`."""
    x, y = center
    return float(x + dx - r), float(y + dy - r), float(x + dx + r), float(y + dy + r)


def _core(distance: np.ndarray, member: np.ndarray) -> np.ndarray:
    """The two fifths of a component that differ most from the background.

    They have its colour, free of anti-aliasing.
    """
    values = distance[member]
    return member & (distance >= np.partition(values, int(0.6 * len(values)))[int(0.6 * len(values))])


def _color(core: np.ndarray, palette: np.ndarray, faintest: float) -> tuple[int, bool]:
    """Palette index of a component's core `(P, 3)`, and whether the core is that colour alone.

    Core and palette are offsets to the background. Thin rims never reach full coverage, so a colour
    also stands for its blends with the background down to `faintest`.
    """

    def gaps(points: np.ndarray) -> np.ndarray:
        share = np.clip(points @ palette.T / (palette**2).sum(axis=1), faintest, 1)
        return np.linalg.norm(points[:, None] - share[..., None] * palette, axis=-1)

    mean = gaps(core.mean(axis=0, keepdims=True))[0]
    color = int(mean.argmin())
    purity = (gaps(core).argmin(axis=1) == color).mean()
    return color, bool(purity >= MIN_PURITY and mean[color] <= MAX_COLOR_DISTANCE)


def _patch(offset: np.ndarray, full: np.ndarray, member: np.ndarray, half: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Coverage of one component in a window around the middle of its box, and that middle `(x, y)`.

    `full` is the offset to the background at coverage 1.
    """
    grown = member.copy()
    grown[1:] |= member[:-1]
    grown[:-1] |= member[1:]
    grown[:, 1:] |= grown[:, :-1].copy()
    grown[:, :-1] |= grown[:, 1:].copy()
    alpha = np.clip(offset @ full / (full @ full), 0, 1) * grown
    ys, xs = np.nonzero(member)
    x, y = (xs.min() + xs.max()) // 2, (ys.min() + ys.max()) // 2
    padded = np.pad(alpha, half)
    return padded[y : y + 2 * half + 1, x : x + 2 * half + 1].ravel(), (int(x), int(y))


def _match(patches: np.ndarray, bank: Bank) -> list[tuple[int, float]]:
    """Best template of each patch and its soft IoU: sum of minima over sum of maxima.

    A shortlist goes by cosine; on it the IoU is exact.
    """
    best_templates = []
    for patch, cosines in zip(patches, patches @ bank.unit.T, strict=True):
        shortlist = np.argpartition(-cosines, SHORTLIST)[:SHORTLIST]
        low = np.minimum(bank.templates[shortlist], patch).sum(axis=1)
        iou = low / (bank.templates[shortlist].sum(axis=1) + patch.sum() - low)
        best_templates.append((int(shortlist[iou.argmax()]), float(iou.max())))
    return best_templates
