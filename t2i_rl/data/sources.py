"""Where images and their captions lie on a disk: COCO's layout, a folder, a webdataset, parquet files. Nothing is decoded before it is asked for."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from t2i_rl.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Source:
    """`captions[i]` are the texts of item `i`, one or more; `names[i]` tells it from the others; `open(i)` reads its image's bytes."""

    def __init__(self, names: list[str], captions: list[list[str]]):
        self.names, self.captions = names, captions

    def __len__(self) -> int:
        return len(self.names)

    def open(self, item: int) -> bytes:
        raise NotImplementedError

    def image(self, item: int) -> Image.Image:
        """The picture, RGB.

        Raises:
            UserError: it cannot be read; the line names it.
        """
        try:
            return Image.open(io.BytesIO(self.open(item))).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"image {self.names[item]} cannot be read: {error}") from error


class Files(Source):
    """Images that are files of their own."""

    def __init__(self, files: list[Path], captions: list[list[str]]):
        super().__init__([str(file) for file in files], captions)

    def open(self, item: int) -> bytes:
        return Path(self.names[item]).read_bytes()


def coco(path: Path, split: str) -> Source:
    """`annotations/captions_<split>.json` and the images in `<split>/`, as COCO is published; an image's captions stay together."""
    annotations = path / "annotations" / f"captions_{split}.json"
    if not annotations.is_file():
        raise UserError(
            f"data.path={path}: there is no {annotations.relative_to(path)}; COCO's layout is annotations/captions_{split}.json and {split}/*.jpg"
        )
    table = _json(annotations)
    captions: dict[int, list[str]] = {}
    for row in sorted(table["annotations"], key=lambda row: row["id"]):
        captions.setdefault(row["image_id"], []).append(" ".join(row["caption"].split()))
    rows = [(path / split / row["file_name"], captions[row["id"]]) for row in table["images"] if row["id"] in captions]
    return _present(Files([file for file, _ in rows], [texts for _, texts in rows]))


def folder(path: Path, split: str) -> Source:
    """Images with `<name>.txt` beside them, a caption a line; or a `metadata.jsonl` of `file_name` and `text` (or `caption`), a line or several an image."""
    table = path / "metadata.jsonl"
    if table.is_file():
        captions: dict[Path, list[str]] = {}
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                captions.setdefault(path / row["file_name"], []).extend(_texts(row.get("text", row.get("caption"))))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{table}:{number}: expected an object with file_name and text") from error
        return _present(Files(list(captions), list(captions.values())))
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    lacking = next((file for file in files if not file.with_suffix(".txt").is_file()), None)
    if lacking:
        raise UserError(
            f"{lacking} has no caption: write {lacking.with_suffix('.txt').name} beside it, or a metadata.jsonl in {path}"
        )
    return Files(files, [_texts(file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()) for file in files])


class WebDataset(Source):
    """Tar shards whose members share a key: `<key>.jpg` with `<key>.txt`, or `<key>.json` with `caption` or `text`. Read in place, in any order."""

    def __init__(self, shards: list[Path]):
        self.places: list[tuple[Path, int, int]] = []
        names, captions = [], []
        for shard in shards:
            for key, (place, texts) in _members(shard).items():
                names.append(f"{shard}:{key}")
                captions.append(texts)
                self.places.append((shard, *place))
        super().__init__(names, captions)

    def open(self, item: int) -> bytes:
        shard, offset, size = self.places[item]
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _members(shard: Path) -> dict[str, tuple[tuple[int, int], list[str]]]:
    images, texts = {}, {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder_name, _, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                key = f"{folder_name}/{key}"
                if f".{suffix.lower()}" in PICTURES:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "txt":
                    texts[key] = _texts(archive.extractfile(member).read().decode().splitlines())
                elif suffix == "json" and key not in texts:
                    row = json.loads(archive.extractfile(member).read())
                    texts[key] = _texts(row.get("caption", row.get("text")))
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a plain tar file ({error})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shard}: a caption cannot be read ({error})") from error
    lacking = next((key for key in images if not texts.get(key)), None)
    if lacking:
        raise UserError(f"{shard}: {lacking.lstrip('/')} has no caption (.txt, or .json with caption)")
    return {key: (place, texts[key]) for key, place in images.items()}


class Parquet(Source):
    """Parquet files with a column of images (bytes, or structs with `bytes` or `path`, as datasets writes them) and one of texts."""

    def __init__(self, files: list[Path]):
        import pyarrow.parquet as pq
        from pyarrow.lib import ArrowInvalid

        names, captions, self.rows = [], [], []
        for file in files:
            try:
                columns = pq.read_schema(file).names
            except ArrowInvalid as error:
                raise UserError(f"{file}: not a parquet file ({str(error).splitlines()[0]})") from error
            texts = next((name for name in ("text", "caption", "captions", "prompt") if name in columns), None)
            if "image" not in columns or texts is None:
                raise UserError(
                    f"{file} has the columns {', '.join(columns)}; needed are image and text (or caption, captions, prompt)"
                )
            for row, value in enumerate(pq.read_table(file, columns=[texts])[texts].to_pylist()):
                names.append(f"{file}:{row}")
                captions.append(_texts(value))
                self.rows.append((file, row))
        super().__init__(names, captions)
        self._file, self._group, self._table = None, None, None

    def open(self, item: int) -> bytes:
        file, row = self.rows[item]
        image = self._row_group(file, row)
        if isinstance(image, dict):
            if image.get("bytes") is None:
                return (file.parent / image["path"]).read_bytes()
            return image["bytes"]
        return image

    def _row_group(self, file: Path, row: int):
        import pyarrow.parquet as pq

        if self._file != file:
            self._file, self._group, self._reader = file, None, pq.ParquetFile(file)
            counts = [self._reader.metadata.row_group(i).num_rows for i in range(self._reader.metadata.num_row_groups)]
            self._starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        group = next(i for i, start in enumerate(self._starts[1:]) if row < start)
        if self._group != group:
            self._group, self._table = group, self._reader.read_row_group(group, columns=["image"])["image"]
        return self._table[row - self._starts[group]].as_py()


def find_source(path: str, layout: str, split: str) -> Source:
    """The pairs below `path`. `layout` is `coco`, `folder`, `webdataset`, `parquet`, or `auto`: what the files there say.

    Raises:
        UserError: there is nothing of the kind, or a file is broken; the line names it.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"data.path={path}: there is no such folder")
    shards = [root] if root.suffix == ".tar" else sorted(root.glob("*.tar"))
    tables = [root] if root.suffix == ".parquet" else sorted(root.glob("*.parquet"))
    if layout == "auto":
        layout = (
            "coco" if (root / "annotations").is_dir() else "webdataset" if shards else "parquet" if tables else "folder"
        )
    makers = {
        "coco": lambda: coco(root, split),
        "folder": lambda: folder(root, split),
        "webdataset": lambda: WebDataset(shards),
        "parquet": lambda: Parquet(tables),
    }
    if layout not in makers:
        raise UserError(f"data.layout must be auto, {', '.join(makers)}, not {layout!r}")
    source = makers[layout]()
    if not len(source):
        raise UserError(f"data.path={path}: no images with captions in the layout {layout!r}")
    empty = next((name for name, texts in zip(source.names, source.captions, strict=True) if not texts), None)
    if empty:
        raise UserError(f"{empty} has an empty caption")
    return source


def _present(source: Files) -> Files:
    missing = next((name for name in source.names if not Path(name).is_file()), None)
    if missing:
        raise UserError(f"{missing} is named among the captions and is not there")
    return source


def _texts(value) -> list[str]:
    values = [value] if isinstance(value, str) else value
    return [" ".join(text.split()) for text in values if text.strip()]


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
