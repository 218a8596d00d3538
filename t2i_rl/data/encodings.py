"""Latents and texts of a data set, encoded once: shards of rows, checksummed and resumable.

Of an image its posterior's mean and deviation are kept: latents are sampled anew each time they are
read. Of a caption it is what its encoders say, without padding that is known beforehand; equal
captions are kept once.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_object, write_atomic
from t2i_rl.core.finite import check_finite
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.pixels import OVERFLOW
from t2i_rl.core.seeding import row_normals
from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding

FORMAT = "t2i_rl.encodings.1"
KINDS = ("images", "texts")


@dataclass
class EncodedPairs:
    """This rank's share of a batch, read from shards.

    Without `text` the captions are encoded on the fly.
    """

    numbers: list[int]
    captions: list[str]
    mean: torch.Tensor
    std: torch.Tensor
    text: dict[str, torch.Tensor] | None

    def encode(self, model: LatentDiffusion, seeds: list[int]) -> tuple[torch.Tensor, TextEncoding]:
        """Latents `(R, C, h, w)`, row `i` sampled with `seeds[i]`, and texts."""
        noise = row_normals(seeds, self.mean.shape[1:]).to(self.mean.device)
        x0 = model.scaled(self.mean.float() + self.std.float() * noise)
        if self.text is None:
            return x0, model.encode_prompts(self.captions)
        return x0, model.expand({name: part.to(model.dtype) for name, part in self.text.items()})

    def to(self, device: torch.device | str) -> "EncodedPairs":
        text = None if self.text is None else {name: part.to(device) for name, part in self.text.items()}
        return EncodedPairs(self.numbers, self.captions, self.mean.to(device), self.std.to(device), text)


def about(model: LatentDiffusion, size: int, images: int, texts: int) -> dict:
    """What a folder of encodings is of."""
    return {
        "format": FORMAT,
        "kind": model.kind,
        "encoders_sha256": weights_sha256(torch.nn.ModuleList([model.vae, model.text_encoders])),
        "size": size,
        "text_length": model.max_sequence_length,
        "images": images,
        "texts": texts,
    }


def write_shard(folder: Path, kind: str, number: int, keys: list[str], rows: dict[str, torch.Tensor]) -> int:
    """Write one shard, then the record that makes it count; returns its bytes.

    Raises:
        UserError: a row is not finite; the line names it, and nothing is written.
    """
    tensors = {name: part.to("cpu", torch.bfloat16).contiguous() for name, part in rows.items()}
    for name, part in tensors.items():
        finite = torch.isfinite(part).flatten(1).all(dim=1)
        if not finite.all():
            raise UserError(f"the {name} of {keys[int((~finite).nonzero()[0])]!r} ({kind}) is not finite: {OVERFLOW}")
    content = save(tensors)
    write_atomic(folder / f"{kind}-{number:05d}.safetensors", content)
    record = {"keys": keys, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    write_atomic(folder / f"{kind}-{number:05d}.json", json.dumps(record))
    return len(content)


def finished(folder: Path, kind: str, number: int, keys: list[str]) -> int | None:
    """The bytes of a shard that is there already, whole, finite and of these keys.

    None: it has to be written.
    """
    file, record_file = folder / f"{kind}-{number:05d}.safetensors", folder / f"{kind}-{number:05d}.json"
    if not (file.is_file() and record_file.is_file()):
        return None
    record = read_object(record_file, "keys", "bytes", "sha256")
    if record["keys"] != keys or record["bytes"] != file.stat().st_size:
        return None
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        return None
    return record["bytes"] if all(torch.isfinite(part).all() for part in load(content).values()) else None


class Encodings:
    """A finished folder, read row by row; a shard's checksum is compared when it is first opened.

    Args:
        about: what the folder says of itself, see `about`.
        places: by kind and key, the number of a shard and a row in it.
        sums: each shard's sha256.
    """

    def __init__(self, folder: Path, about: dict, places: dict[str, dict[str, tuple[int, int]]], sums: dict[str, str]):
        self.folder, self.about, self.places, self.sums = folder, about, places, sums
        self._shards: dict[str, safe_open] = {}

    @classmethod
    def open(cls, path: str) -> "Encodings":
        """Read the records of a folder.

        Raises:
            UserError: it is none, or it is not finished.
        """
        folder = Path(path)
        if not (folder / "about.json").is_file():
            raise UserError(f"data.encodings={path}: no about.json there; make the folder with task=encode")
        facts = read_object(folder / "about.json", "format", *KINDS)
        if facts["format"] != FORMAT:
            raise UserError(f"data.encodings={path}: about.json does not say {FORMAT!r}")
        places: dict[str, dict[str, tuple[int, int]]] = {kind: {} for kind in KINDS}
        sums = {}
        for kind in KINDS:
            for file in sorted(folder.glob(f"{kind}-*.json")):
                if not file.stem.removeprefix(f"{kind}-").isdecimal():
                    raise UserError(f"{file} is no record of a shard, whose name ends in a number: delete it")
                number, record = int(file.stem.split("-")[1]), read_object(file, "keys", "sha256")
                sums[f"{kind}-{number:05d}"] = record["sha256"]
                places[kind] |= {key: (number, row) for row, key in enumerate(record["keys"])}
            if len(places[kind]) < facts[kind]:
                count = f"{len(places[kind])} of {facts[kind]} {kind} are encoded"
                raise UserError(f"data.encodings={path}: {count}; the same task=encode again goes on")
        return cls(folder, facts, places, sums)

    def check(self, model: LatentDiffusion, size: int) -> None:
        """Whether these are encodings by this model's encoders at this size.

        Raises:
            UserError: they are not.
        """
        expected = about(model, size, self.about["images"], self.about["texts"])
        for name, value in expected.items():
            if self.about[name] != value:
                difference = f"made with {name}={self.about[name]}, but this run has {value}"
                raise UserError(f"data.encodings={self.folder}: {difference}; encode again")

    def check_holds(self, names: list[str]) -> None:
        """Whether all images of these names were encoded.

        Raises:
            UserError: one was not.
        """
        lacking = next((name for name in names if name not in self.places["images"]), None)
        if lacking is not None:
            raise UserError(
                f"data.encodings={self.folder}: {lacking!r} is not among its images; encode this data set again, into "
                "another folder"
            )

    def pairs(self, numbers: list[int], names: list[str], captions: list[str]) -> EncodedPairs:
        """A batch.

        Raises:
            UserError: an image or caption was not encoded, a shard has changed since, or a row is
                not finite.
        """
        images = self._rows("images", names)
        text = self._rows("texts", captions) if self.about["texts"] else None
        return EncodedPairs(numbers, captions, images["mean"], images["std"], text)

    def _rows(self, kind: str, keys: list[str]) -> dict[str, torch.Tensor]:
        unknown = next((key for key in keys if key not in self.places[kind]), None)
        if unknown is not None:
            raise UserError(
                f"data.encodings={self.folder}: {unknown!r} is not among its {kind}; encode this data set again"
            )
        rows = []
        for key in keys:
            number, row = self.places[kind][key]
            shard = self._shard(f"{kind}-{number:05d}")
            rows.append({name: shard.get_slice(name)[row] for name in shard.keys()})  # noqa: SIM118
        joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        for name, part in joined.items():
            check_finite(part, f"data.encodings={self.folder}: {name} of {kind}", "encode this data set again")
        return joined

    def _shard(self, name: str) -> safe_open:
        """A shard, mapped and not read, after its checksum was compared once."""
        if name not in self._shards:
            file = self.folder / f"{name}.safetensors"
            try:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{file} cannot be read ({error.strerror}): run task=encode again") from error
            if digest != self.sums[name]:
                raise UserError(f"{file} has changed since it was written: delete it and run task=encode again")
            self._shards[name] = safe_open(file, "pt")
        return self._shards[name]
