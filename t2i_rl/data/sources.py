"""Images and their captions on a disk: COCO's layout, a folder, a webdataset, parquet files."""

import os
import tarfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import decoded, lines_of, parse_json, read_bytes, read_json, read_json_lines
from t2i_rl.core.members import is_image, matched
from t2i_rl.core.pixels import read_image
from t2i_rl.core.ranks import is_main_process
from t2i_rl.core.texts import fault_of_text

TEXT_COLUMNS = ("text", "caption", "captions", "prompt")


class Source:
    """Images and the texts of each, where they lie.

    names: `names[i]` tells item `i` from the others. captions: `captions[i]` are its texts, one or
    more. ignored: names of what lies there and is not taken up.
    """

    def __init__(self, names: list[str], captions: list[list[str]], ignored: Iterable[str] = ()):
        self.names, self.captions, self.ignored = names, captions, list(ignored)

    def __len__(self) -> int:
        return len(self.names)

    def open(self, item: int) -> bytes:
        """The bytes of an image's file.

        Raises:
            UserError: they cannot be read.
        """
        raise NotImplementedError

    def image(self, item: int) -> Image.Image:
        """The image as `core.pixels.read_image` gives it.

        Raises:
            UserError: it cannot be read; the line names it.
        """
        return read_image(self.open(item), self.names[item])


class Files(Source):
    """Images that are files of their own."""

    def __init__(self, files: list[Path], captions: list[list[str]], ignored: Iterable[str] = ()):
        super().__init__([str(file) for file in files], captions, ignored)

    def open(self, item: int) -> bytes:
        return read_bytes(self.names[item])


def coco(path: Path, split: str) -> Source:
    """`annotations/captions_<split>.json` and the images in `<split>/`, as COCO is published.

    An image's captions stay together.

    Raises:
        UserError: a file is missing or broken; the line names it.
    """
    annotations = path / "annotations" / f"captions_{split}.json"
    if not annotations.is_file():
        raise UserError(
            f"data.path={path}: there is no {annotations.relative_to(path)}; COCO's layout is "
            f"annotations/captions_{split}.json and {split}/*.jpg"
        )
    table = read_json(annotations)
    rows = {key: _rows_by_id(table, key, annotations) for key in ("images", "annotations")}
    names: dict[str, object] = {}
    for number, row in rows["images"].items():
        name = _text_in(row, "file_name", f"{annotations}: images: id {number!r}")
        if name in names:
            raise UserError(f"{annotations}: images: id {number!r} has the file of id {names[name]!r}, {name}")
        names[name] = number
    captions: dict[object, list[str]] = {}
    strays = []
    for number, row in sorted(rows["annotations"].items(), key=lambda item: (isinstance(item[0], str), item[0])):
        place = f"{annotations}: annotations: id {number!r}"
        if row.get("image_id") not in rows["images"]:
            strays.append(f"{place}, of an image that is not in the table")
            continue
        captions.setdefault(row["image_id"], []).extend(_captions_in(row, ("caption",), place))
    captions_of = {name: captions[number] for name, number in names.items() if number in captions}
    files = [path / split / name for name in captions_of]
    return _present(Files(files, list(captions_of.values()), strays + _images_but(path / split, files)))


def _rows_by_id(table: object, key: str, file: Path) -> dict:
    rows = table.get(key) if isinstance(table, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{file}: there is no list {key!r}: is this one of COCO's caption files?")
    by_id = {}
    for number, row in enumerate(rows):
        place = f"{file}: {key}: row {number}"
        name = row.get("id") if isinstance(row, dict) else None
        if type(name) not in (int, str):
            raise UserError(f"{place}: not an object with an id")
        if name in by_id:
            raise UserError(f"{place}: the id {name!r} stands twice")
        by_id[name] = row
    return by_id


def folder(path: Path, split: str) -> Source:
    """Images with their texts beside them, or with a `metadata.jsonl`.

    A text is `<name>.txt`, a caption a line, or `<name>.json` (see `members.matched`). The table
    has `file_name` and `text` (or `caption`), a line or several an image.

    Raises:
        UserError: an image has no caption, or a file is broken; the line names it.
    """
    table = path / "metadata.jsonl"
    if table.is_file():
        captions: dict[Path, list[str]] = {}
        for _, place, row in read_json_lines(table):
            file = path / _text_in(row, "file_name", place)
            captions.setdefault(file, []).extend(_captions_in(row, ("text", "caption"), place))
        return _present(Files(list(captions), list(captions.values()), _images_but(path, captions)))
    members = matched(sorted(str(file) for file in path.rglob("*") if file.is_file()))
    if members.lacking:
        image = Path(members.lacking[0])
        fix = f"write {image.with_suffix('.txt').name} beside it, or a metadata.jsonl in {path}"
        raise UserError(f"{image} has no caption: {fix}")
    texts = [_captions_of_file(read_bytes(text), text) for _, text in members.pairs]
    return Files([Path(image) for image, _ in members.pairs], texts, members.ignored)


class WebDataset(Source):
    """Tar shards whose members share a name, read in place and in any order.

    An image `<key>.jpg` goes with `<key>.txt`, or with `<key>.json` that has `caption` or `text`
    (see `members.matched`).
    """

    def __init__(self, shards: list[Path]):
        self._extents: list[tuple[Path, int, int]] = []  # of each image: its shard, offset and size in bytes
        names, captions, ignored = [], [], []
        for shard in shards:
            samples, ignored_members = _members(shard)
            ignored += ignored_members
            for key, (offset, size, texts) in samples.items():
                names.append(f"{shard}:{key}")
                captions.append(texts)
                self._extents.append((shard, offset, size))
        super().__init__(names, captions, ignored)

    def open(self, item: int) -> bytes:
        shard, offset, size = self._extents[item]
        try:
            with shard.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise UserError(f"{shard} cannot be read: {error.strerror}") from error


def _members(shard: Path) -> tuple[dict[str, tuple[int, int, list[str]]], list[str]]:
    """An image's offset, size and captions, by its key; and the names of what is ignored."""
    try:
        with tarfile.open(shard, "r:") as archive:
            files = _files_of(archive, shard)
            members = matched(files)
            if members.lacking:
                raise UserError(f"{shard}: {members.lacking[0]} has no caption (.txt, or .json with caption)")
            samples = {}
            for image, text in members.pairs:
                key = image[: -len(Path(image).suffix)]
                if key in samples:
                    raise UserError(f"{shard}: {key} has two images, {image} and another: leave one")
                texts = _captions_of_file(archive.extractfile(files[text]).read(), f"{shard}: {text}")
                samples[key] = files[image].offset_data, files[image].size, texts
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a plain tar file ({error})") from error
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror or error}") from error
    keyed = {key if "/" in key else f"/{key}": sample for key, sample in samples.items()}
    return keyed, [f"{shard}: {name}" for name in members.ignored]


def _files_of(archive: tarfile.TarFile, shard: Path) -> dict[str, tarfile.TarInfo]:
    """The members that are files, by name.

    Raises:
        UserError: a name stands twice, or the shard is not whole.
    """
    files: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        if not member.isfile() or member.issparse():
            continue
        if member.name in files:
            raise UserError(f"{shard}: the member {member.name} stands twice")
        files[member.name] = member
    _check_end(archive, shard)
    return files


def _check_end(archive: tarfile.TarFile, shard: Path) -> None:
    """A tar ends with zeros.

    Python takes any broken header for the end, and silently loses what follows.
    """
    archive.fileobj.seek(archive.offset)
    zeros = 0
    for block in iter(partial(archive.fileobj.read, 1 << 20), b""):
        if any(block):
            fault = "what follows its last member is no tar"
            raise UserError(f"{shard}: {fault}: it is damaged, or another tar was joined to it")
        zeros += len(block)
    if zeros < tarfile.BLOCKSIZE:
        raise UserError(f"{shard}: there is no end of a tar: it was cut short; fetch or make it anew")


class Parquet(Source):
    """Parquet files with a column of images and one of texts.

    An image is bytes, or a struct with `bytes` or `path`, as the library datasets writes them.
    """

    def __init__(self, files: list[Path]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        names, captions, self.rows = [], [], []
        for file in files:
            try:
                columns = pq.read_schema(file).names
                texts = next((name for name in TEXT_COLUMNS if name in columns), None)
                if "image" not in columns or texts is None:
                    raise UserError(
                        f"{file} has the columns {', '.join(columns)}; needed are image and text "
                        "(or caption, captions, prompt)"
                    )
                values = pq.read_table(file, columns=[texts])[texts].to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a parquet file ({str(error).splitlines()[0]})") from error
            for row, value in enumerate(values):
                names.append(f"{file}:{row}")
                captions.append(_captions(value, f"{file}: row {row}: {texts}"))
                self.rows.append((file, row))
        super().__init__(names, captions)
        self._file, self._group, self._table = None, None, None

    def open(self, item: int) -> bytes:
        file, row = self.rows[item]
        image = self._value(file, row)
        if isinstance(image, dict):
            path = image.get("path")
            image = image.get("bytes")
            if image is None and isinstance(path, str):
                return read_bytes(file.parent / path)
        if not isinstance(image, bytes):
            raise UserError(f"{file}: row {row}: its image is {type(image).__name__}, not bytes or a path")
        return image

    def _value(self, file: Path, row: int) -> Any:
        """A row's image as it stands in the file, of which one group of rows is kept at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self._file != file:
                self._reader = pq.ParquetFile(file)
                self._file, self._group, parts = file, None, self._reader.metadata
                counts = [parts.row_group(number).num_rows for number in range(parts.num_row_groups)]
                self._starts = [sum(counts[:number]) for number in range(len(counts) + 1)]
            group = next(number for number, start in enumerate(self._starts[1:]) if row < start)
            if self._group != group:
                self._table = self._reader.read_row_group(group, columns=["image"])["image"]
                self._group = group
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: row {row}: the file is damaged ({str(error).splitlines()[0]})") from error
        return self._table[row - self._starts[group]].as_py()


def find_source(path: str, layout: str, split: str) -> Source:
    """The pairs below `path`.

    Args:
        layout: `coco`, `folder`, `webdataset`, `parquet`, or `auto`: what the files there say.
        split: of COCO's layout.

    Raises:
        UserError: there is nothing of the kind, or a file is broken; the line names it.
    """
    root = Path(path)
    if not os.path.exists(root):  # pathlib's own raises where a name is too long
        raise UserError(f"data.path={path}: there is no such folder")
    shards, tables = _ending(root, ".tar"), _ending(root, ".parquet")
    if layout == "auto":
        signs = {"coco": (root / "annotations").is_dir(), "webdataset": shards, "parquet": tables}
        layout = next((name for name, sign in signs.items() if sign), "folder")
    makers = {
        "coco": lambda: coco(root, split),
        "folder": lambda: folder(root, split),
        "webdataset": lambda: WebDataset(shards),
        "parquet": lambda: Parquet(tables),
    }
    if layout not in makers:
        raise UserError(f"data.layout must be auto, {', '.join(makers)}, not {layout!r}")
    source = makers[layout]()
    if layout in ("webdataset", "parquet") and root.is_dir():
        source.ignored += sorted(str(file) for file in root.iterdir() if is_image(file.name))
    if source.ignored and is_main_process():
        count = len(source.ignored)
        print(f"{path}: {count} member{'s' * (count > 1)} ignored (first: {source.ignored[0]})", flush=True)
    if not len(source):
        raise UserError(f"data.path={path}: no images with captions in the layout {layout!r}")
    return source


def _ending(root: Path, suffix: str) -> list[Path]:
    """The file itself, or the files in the folder, whose names end so, in capitals or not."""
    files = sorted(root.iterdir()) if root.is_dir() else [root]
    return [file for file in files if file.suffix.lower() == suffix and not file.name.startswith(".")]


def _present(source: Files) -> Files:
    missing = next((name for name in source.names if not os.path.isfile(name)), None)
    if missing:
        raise UserError(f"{missing} is named among the captions and is not there")
    return source


def _images_but(path: Path, named_files: Iterable[Path]) -> list[str]:
    """The images below a folder that its table of captions does not name."""
    named = {os.path.normpath(file) for file in named_files}
    files = (os.path.normpath(file) for file in path.rglob("*"))
    return sorted(file for file in files if is_image(file) and file not in named)


def _captions_of_file(content: bytes, name: str) -> list[str]:
    """The captions of a text, one a line, or of a JSON object with `caption` or `text`."""
    text = decoded(content, name)
    if not name.lower().endswith(".json"):
        return _captions([line for _, line in lines_of(text)], name)
    row = parse_json(text, name)
    if not isinstance(row, dict):
        raise UserError(f"{name}: expected a JSON object with caption or text")
    return _captions_in(row, ("caption", "text"), name)


def _captions_in(row: dict, keys: tuple[str, ...], place: str) -> list[str]:
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise UserError(f"{place}: there is no {' or '.join(keys)}")
    return _captions(row[key], f"{place}: {key}")


def _captions(value: object, place: str) -> list[str]:
    """A text, or a list of them, without line breaks and doubled spaces.

    Raises:
        UserError: it is neither, or one is empty.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise UserError(f"{place}: the caption {fault_of_text(texts)}")
    if not texts:
        raise UserError(f"{place}: the caption is empty")
    fault = next(filter(None, map(fault_of_text, texts)), None)
    if fault:
        raise UserError(f"{place}: the caption {fault}")
    return [" ".join(text.split()) for text in texts]


def _text_in(row: dict, key: str, place: str) -> str:
    if fault := fault_of_text(row.get(key)):
        raise UserError(f"{place}: {key} {fault}")
    return row[key]
