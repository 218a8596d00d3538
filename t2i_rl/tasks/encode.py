"""`task=encode`: latents and texts of a data set, once, for `data.encodings`."""

import json
from pathlib import Path

import numpy as np
import torch
from hydra.utils import get_class, instantiate
from rich.console import Console

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.core.pixels import square
from t2i_rl.core.progress import tracked
from t2i_rl.data.encodings import FORMAT, about, finished, write_shard
from t2i_rl.data.image_text import ImageText
from t2i_rl.shapes.render import to_pixels
from t2i_rl.tasks.examine import announce_model


def check(cfg) -> None:
    """Refuse data that are no pairs of files.

    Raises:
        UserError: they are not.
    """
    if not issubclass(get_class(cfg.data._target_), ImageText):
        raise UserError("task=encode takes pairs from a disk: data=coco or data=image_text")


def run(cfg) -> dict:
    """Encode every image and every different caption of `cfg.data` into `cfg.task.out`.

    It goes on where an earlier run stopped.

    Raises:
        UserError: the folder holds encodings of something else.
    """
    data = instantiate(cfg.data)
    items, captions = data.work()
    captions = captions if cfg.task.texts else []
    announce_model(cfg, captions)
    model = instantiate(cfg.model).requires_grad_(False)
    folder, part = Path(cfg.task.out), (cfg.task.part, cfg.task.parts)
    mine = about(model, data.size, len(items), len(captions))
    if (folder / "about.json").is_file() and read_json(folder / "about.json") != mine:
        raise UserError(f"task.out={folder} holds encodings of another model, size or data set: name another folder")
    write_atomic(folder / "about.json", json.dumps(mine, indent=1))

    def images(chosen: list[int]) -> dict[str, torch.Tensor]:
        mean, std = model.posterior(
            to_pixels(np.stack([square(data.source.image(item), data.size) for item in chosen]))
        )
        return {"mean": mean, "std": std}

    def texts(chosen: list[str]) -> dict[str, torch.Tensor]:
        return model.compact(model.encode_prompts(chosen))

    names = [data.source.names[item] for item in items]
    written = {
        "images": _shards(folder, "images", names, items, images, cfg.task, part),
        "texts": _shards(folder, "texts", captions, captions, texts, cfg.task, part),
    }
    per_pair = {kind: total / max(count, 1) for kind, (total, count) in written.items()}
    Console().print(
        f"{folder}: {written['images'][1]} images of {per_pair['images'] / 1e3:.1f} kB, "
        f"{written['texts'][1]} captions of {per_pair['texts'] / 1e3:.1f} kB; "
        f"{sum(per_pair.values()) * 1e5 / 1e9:.2f} GB for 100,000 pairs   (data.encodings={folder})",
        soft_wrap=True,
    )
    return {"folder": str(folder), "format": FORMAT, "bytes": {kind: total for kind, (total, _) in written.items()}}


@torch.no_grad()
def _shards(
    folder: Path, kind: str, keys: list[str], work: list, encode, settings, part: tuple[int, int]
) -> tuple[int, int]:
    """Bytes and rows of this part's shards, those that were there before among them."""
    size, total, rows = settings.rows_per_shard, 0, 0
    numbers = range(part[0], -(-len(keys) // size), part[1])
    for number in tracked(numbers, kind, "shard"):
        chosen = slice(number * size, (number + 1) * size)
        written = finished(folder, kind, number, keys[chosen])
        if written is None:
            batches = [
                encode(work[chosen][i : i + settings.batch_size])
                for i in range(0, len(work[chosen]), settings.batch_size)
            ]
            joined = {name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]}
            written = write_shard(folder, kind, number, keys[chosen], joined)
        total, rows = total + written, rows + len(keys[chosen])
    return total, rows
