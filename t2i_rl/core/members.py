"""Which files of a folder or a tar are images, and which text belongs to each, by name alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from t2i_rl.core.errors import UserError
from t2i_rl.core.pixels import IMAGE_ENDINGS

TEXT_ENDINGS = (".txt", ".caption.txt", ".json")  # the first that is there is taken


@dataclass
class Members:
    """Names of files: what goes together, and what does not.

    pairs: (image, text) in the images' order. lacking: images without a text. ignored: all others.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def matched(names: Iterable[str]) -> Members:
    """Images with the texts that share their names; endings count in capitals and in small letters.

    `22.05.jpg` goes with `22.05.txt`. Webdataset ends a key at the first dot, and `<key>.image.jpg`
    with `<key>.txt` is one sample there: so an image that has dots and no text of its own takes its
    key's text, if it is the key's only image; beside a `<key>.jpg` it is another field of that
    sample (`<key>.mask.png`), and ignored. Names that begin with a dot are the operating system's.

    Raises:
        UserError: two texts differ in the capitals of their endings alone.
    """
    names, members = list(names), Members()
    visible = [name for name in names if not PurePosixPath(name).name.startswith(".")]
    images = {name: name[: -len(PurePosixPath(name).suffix)] for name in visible if is_image(name)}
    texts: dict[str, str] = {}  # by their names with the ending in small letters
    for name in visible:
        if (key := _text_key(name)) is not None and texts.setdefault(key, name) != name:
            raise UserError(f"{texts[key]} and {name} are texts of one name: keep one")
    stems, images_of_sample = set(images.values()), Counter(map(_sample_of, images.values()))
    for name, stem in images.items():
        sample = _sample_of(stem)
        text = _text_of(stem, texts)
        if text is None and sample != stem and sample in stems:
            continue
        if text is None and images_of_sample[sample] == 1:
            text = _text_of(sample, texts)
        if text is None:
            members.lacking.append(name)
        else:
            members.pairs.append((name, text))
    used = {name for pair in members.pairs for name in pair} | set(members.lacking)
    stems_of_pairs = {images[name] for name, _ in members.pairs}
    spare_texts = {name for key, name in texts.items() if _without_text_ending(key) in stems_of_pairs}
    members.ignored = [name for name in names if name not in used and name not in spare_texts]
    return members


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_ENDINGS


def _sample_of(stem: str) -> str:
    """The key of a webdataset's sample: the name up to its first dot."""
    folder, slash, base = stem.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _text_key(name: str) -> str | None:
    ending = next((ending for ending in reversed(TEXT_ENDINGS) if name.lower().endswith(ending)), None)
    return None if ending is None else name[: -len(ending)] + ending


def _without_text_ending(key: str) -> str:
    return key[: -len(next(ending for ending in reversed(TEXT_ENDINGS) if key.endswith(ending)))]


def _text_of(stem: str, texts: dict[str, str]) -> str | None:
    return next((texts[stem + ending] for ending in TEXT_ENDINGS if stem + ending in texts), None)
