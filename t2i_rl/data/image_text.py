"""Training pairs from a disk: any `Source`, in an order that a resumed run continues."""

from collections.abc import Iterable, Iterator

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Pixels, Seed, Whole, check_arguments
from t2i_rl.core.pixels import square
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.data.base import Data
from t2i_rl.data.encodings import EncodedPairs, Encodings
from t2i_rl.data.pairs import PixelPairs, share_of
from t2i_rl.data.sources import Source, find_source
from t2i_rl.shapes.render import to_pixels


class ImageTextStream(IterableDataset):
    """Batch `k` of all ranks is a function of `(seed, k)`.

    An image comes once an epoch, under one of its captions; no caption comes twice in a batch.
    """

    def __init__(
        self,
        source: Source,
        items: list[int],
        batch_size: int,
        size: int,
        seed: int,
        first: int,
        encodings: Encodings | None,
    ):
        self.source, self.items, self.batch_size, self.size = source, items, batch_size, size
        self.seed, self.position, self.encodings = seed, first, encodings
        self._epoch: int | None = None  # of which `_order` is
        self._order: list[int] = []

    def __iter__(self) -> Iterator[PixelPairs | EncodedPairs]:
        first, share = share_of(self.batch_size)
        while True:
            pairs = self.batch(self.position)[first : first + share]
            self.position += 1
            numbers, captions = list(range(first, first + share)), [caption for _, caption in pairs]
            if self.encodings is not None:
                yield self.encodings.pairs(numbers, [self.source.names[item] for item, _ in pairs], captions)
                continue
            images = np.stack([square(self.source.image(item), self.size) for item, _ in pairs])
            yield PixelPairs(numbers, captions, to_pixels(images))

    def batch(self, number: int) -> list[tuple[int, str]]:
        """Items and captions of a batch.

        Raises:
            UserError: there are not so many images with different captions.
        """
        caption_of: dict[int, str] = {}
        for index in range(number * self.batch_size, (number + 1) * self.batch_size):
            item, attempt = self._item(index), 0
            while item in caption_of or (caption := self._caption(index, item, caption_of.values())) is None:
                attempt += 1
                item = self.items[derive_seed(self.seed, "instead", index, attempt) % len(self.items)]
                if attempt > 1000:
                    raise UserError(
                        f"data.batch_size={self.batch_size}: there are not that many images with different captions"
                    )
            caption_of[item] = caption
        return list(caption_of.items())

    def _item(self, index: int) -> int:
        """The item at an index of the endless stream; every epoch has an order of its own."""
        epoch, offset = divmod(index, len(self.items))
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, 6, epoch)).permutation(len(self.items)).tolist()
        return self.items[self._order[offset]]

    def _caption(self, index: int, item: int, batch_captions: Iterable[str]) -> str | None:
        """One of an item's captions that the batch does not have yet, or None."""
        captions, lowered = self.source.captions[item], {text.casefold() for text in batch_captions}
        start = derive_seed(self.seed, "caption", index, item)
        turned = (captions[(start + turn) % len(captions)] for turn in range(len(captions)))
        return next((caption for caption in turned if caption.casefold() not in lowered), None)


class ImageText(Data):
    """Pairs from a local folder.

    Args:
        path: where they lie.
        layout, split: see `sources.find_source`.
        size: pixels a side that the model is trained at.
        batch_size: pairs a step, over all ranks together: B images under B texts.
        held_out: so many items, drawn by `seed`, are never trained on; the first captions of them
            are the `validation` prompts.
        encodings: a folder that task=encode has written: latents and texts are read from it, and no
            image is opened.

    Raises:
        UserError: nothing to train on, or encodings of something else.
    """

    gives = "pairs"

    def __init__(
        self,
        path: str,
        layout: str = "auto",
        split: str = "train2017",
        size: Pixels = 512,
        batch_size: Count = 4,
        held_out: Whole = 50,
        encodings: str | None = None,
        seed: Seed = 0,
    ):
        super().__init__()
        check_arguments(ImageText, locals(), "data")
        self.source, self.size, self.batch_size, self.seed = find_source(path, layout, split), size, batch_size, seed
        order = np.random.default_rng((seed, 7)).permutation(len(self.source)).tolist()
        held_out_items, self.items = order[:held_out], sorted(order[held_out:])
        if batch_size < 2 or len(self.items) < batch_size:
            raise UserError(
                f"data.batch_size={batch_size} must be from 2 to the {len(self.items)} training images that "
                f"data.held_out={held_out} leaves of {len(order)}: lower one of them"
            )
        captions = [self.source.captions[item][0] for item in held_out_items]
        self.validation = [Prompt(f"held-out-{number}", caption) for number, caption in enumerate(captions)]
        self.prompts = self.validation or [Prompt("0", self.source.captions[self.items[0]][0])]
        self.encodings = Encodings.open(encodings) if encodings else None

    def setup(self, stage: str) -> None:
        if self.encodings is not None:
            self.encodings.check_holds([self.source.names[item] for item in self.items])
            self.encodings.check(self.trainer.lightning_module.model, self.size)

    def texts(self) -> list[str]:
        return [] if self.encodings is not None else self.work()[1]

    def train_dataloader(self) -> DataLoader:
        first = self.trainer.lightning_module.batches_done
        stream = ImageTextStream(self.source, self.items, self.batch_size, self.size, self.seed, first, self.encodings)
        return DataLoader(stream, batch_size=None)

    def work(self) -> tuple[list[int], list[str]]:
        """What task=encode encodes: every item, held out or not, and every different caption."""
        captions = dict.fromkeys(caption for texts in self.source.captions for caption in texts)
        return list(range(len(self.source))), list(captions)
