"""Which files of a folder or a tar are images, and which text belongs to each, by their names alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import IMAGE_ENDINGS

TEXT_ENDINGS = (".txt", ".caption.txt", ".json")  # the first that is there is taken


@dataclass
class Members:
    """`pairs`: (image, text) in the images' order; `lacking`: images without a text; `ignored`: the rest."""

    pairs: list[tuple[str, str]] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def matched(names: Iterable[str]) -> Members:
    """Images with the texts that share their names; endings count in capitals and in small letters.

    `22.05.jpg` goes with `22.05.txt`. Webdataset ends a key at the first dot, and `<key>.image.jpg` with `<key>.txt` is
    one sample there: so an image that has dots and no text of its own takes its key's text, if it is the key's only
    image; beside a `<key>.jpg` it is another field of that sample (`<key>.mask.png`), and ignored. Names that begin
    with a dot are the operating system's.

    Raises:
        UserError: two texts differ in the capitals of their endings alone.
    """
    names, members = list(names), Members()
    shown = [name for name in names if not PurePosixPath(name).name.startswith(".")]
    images = {name: name[: -len(PurePosixPath(name).suffix)] for name in shown if is_image(name)}
    texts: dict[str, str] = {}
    for name in shown:
        if (place := _text_place(name)) is not None and texts.setdefault(place, name) != name:
            raise UserError(f"{texts[place]} and {name} are texts of one name: keep one")
    stems, images_of_key = set(images.values()), Counter(map(_key, images.values()))
    for name, stem in images.items():
        key = _key(stem)
        own = _text_of(stem, texts)
        if own is None and key != stem and key in stems:
            continue
        text = own or (_text_of(key, texts) if images_of_key[key] == 1 else None)
        if text is None:
            members.lacking.append(name)
        else:
            members.pairs.append((name, text))
    taken = {name for name, _ in members.pairs} | set(members.lacking) | {text for _, text in members.pairs}
    stems_of_pairs = {images[name] for name, _ in members.pairs}
    spare = {name for place, name in texts.items() if _without_text_ending(place) in stems_of_pairs}
    members.ignored = [name for name in names if name not in taken and name not in spare]
    return members


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_ENDINGS


def _key(stem: str) -> str:
    folder, slash, base = stem.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _text_place(name: str) -> str | None:
    ending = next((ending for ending in reversed(TEXT_ENDINGS) if name.lower().endswith(ending)), None)
    return None if ending is None else name[: -len(ending)] + ending


def _without_text_ending(place: str) -> str:
    return place[: -len(next(ending for ending in reversed(TEXT_ENDINGS) if place.endswith(ending)))]


def _text_of(stem: str, texts: dict[str, str]) -> str | None:
    return next((texts[stem + ending] for ending in TEXT_ENDINGS if stem + ending in texts), None)
