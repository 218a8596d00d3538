"""Preferences on `shapes`: images of one prompt, ranked by the exact judge."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json_lines
from t2i_rl.core.numbers import Count, Seed, check_arguments
from t2i_rl.core.pixels import read_image
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.core.texts import fault_of_text
from t2i_rl.data.base import Data
from t2i_rl.data.pairs import sampled_latents, share_of
from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding
from t2i_rl.shapes.render import to_pixels


@dataclass
class Preferred:
    """This rank's share of a batch.

    pixels: `(2 R, 3, H, W)`, the preferred images of `captions` `(R,)`, then the others.
    """

    numbers: list[int]
    captions: list[str]
    pixels: torch.Tensor

    def encode(self, model: LatentDiffusion, seeds: list[int]) -> tuple[torch.Tensor, TextEncoding]:
        text = model.encode_prompts(self.captions)
        return sampled_latents(model, self.pixels, seeds), text.map(lambda part: torch.cat([part, part]))

    def to(self, device: torch.device | str) -> "Preferred":
        return Preferred(self.numbers, self.captions, self.pixels.to(device))


class PreferenceStream(IterableDataset):
    """Batch `k` of all ranks is a function of `(seed, k)`; every epoch is its own order.

    Both images of a pair have one number: one draw.
    """

    def __init__(self, folder: Path, rows: list[dict], batch_size: int, seed: int, first: int):
        self.folder, self.rows, self.batch_size, self.seed, self.position = folder, rows, batch_size, seed, first

    def __iter__(self) -> Iterator[Preferred]:
        first, share = share_of(self.batch_size)
        while True:
            start = self.position * self.batch_size + first
            rows = [self.rows[self._row(index)] for index in range(start, start + share)]
            self.position += 1
            names = [row["preferred"] for row in rows] + [row["other"] for row in rows]
            images = [np.asarray(read_image(self.folder / name)) for name in names]
            odd = next((number for number, image in enumerate(images) if image.shape != images[0].shape), None)
            if odd is not None:
                sizes = " and ".join(f"{names[i]} has {images[i].shape[1]}x{images[i].shape[0]}" for i in (0, odd))
                raise UserError(f"{self.folder}: pictures of preferences must be of one size, but {sizes}")
            numbers = list(range(first, first + share))
            yield Preferred(numbers + numbers, [row["prompt"] for row in rows], to_pixels(np.stack(images)))

    def _row(self, index: int) -> int:
        """The number of the row at an index of the endless stream."""
        epoch, offset = divmod(index, len(self.rows))
        rng = np.random.default_rng(derive_seed(self.seed, "preferences", epoch))
        return int(rng.permutation(len(self.rows))[offset])


class Preferences(Data):
    """Pairs that task=make_preferences has written, or anybody in its form.

    Its rows have `prompt`, `preferred` and `other`.

    Raises:
        UserError: there are none, or fewer than a batch; or a row is broken or names a file that is
            not there.
    """

    gives = "preferences"

    def __init__(self, path: str, batch_size: Count = 16, seed: Seed = 0):
        super().__init__()
        check_arguments(Preferences, locals(), "data")
        self.folder, self.batch_size, self.seed = Path(path), batch_size, seed
        file = self.folder / "preferences.jsonl"
        if not file.is_file():
            fix = "make the folder with task=make_preferences"
            raise UserError(f"data.path={path}: there is no preferences.jsonl; {fix}")
        self.rows = [_checked(row, place, self.folder) for _, place, row in read_json_lines(file)]
        if len(self.rows) < batch_size:
            raise UserError(f"data.batch_size={batch_size}, but there are only {len(self.rows)} preferences")
        self.prompts = [Prompt(str(number), row["prompt"]) for number, row in enumerate(self.rows)]

    def train_dataloader(self) -> DataLoader:
        first = self.trainer.lightning_module.batches_done
        stream = PreferenceStream(self.folder, self.rows, self.batch_size, self.seed, first)
        return DataLoader(stream, batch_size=None)


def _checked(row: dict, place: str, folder: Path) -> dict:
    for key in ("prompt", "preferred", "other"):
        if fault := fault_of_text(row.get(key)):
            raise UserError(f"{place}: {key} {fault}")
    for key in ("preferred", "other"):
        if not os.path.isfile(folder / row[key]):
            raise UserError(f"{place}: {key} names {row[key]}, which is not there")
    return row
