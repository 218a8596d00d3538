"""The teacher outside `shapes`: good pictures, given or drawn by another model, and a writer that looks at them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from t2i_rl.core.contracts import ImageModel
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json_lines
from t2i_rl.core.numbers import Count
from t2i_rl.core.pixels import read_image
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.ranks import own_gpu
from t2i_rl.core.texts import fault_of_text
from t2i_rl.methods.irg.rounds import says_stop
from t2i_rl.methods.irg.writers import Asked

THINK = (
    "This picture was drawn for the request below. Write the plan that somebody has in mind before drawing it: every "
    "object with its number, colour, material and place, then light, style and mood, in at most {words} words. Write "
    "it as a plan; do not mention the picture.\n\nRequest: {prompt}"
)
REFLECT = (
    "Both pictures were drawn for the request below; the second is better. You see the first and want the second. "
    "Begin with a paragraph on what is wrong with the first. Then write three sections titled "
    "'### Detailed Explanation of Required Improvements', '### Step-by-Step Modification Guidance' and "
    "'### Final Comprehensive Prompt for the Improved Image', concrete about composition, light, colour, texture, "
    "position and style, in at most {words} words. Never speak of the second picture as if it were there. If the first "
    "needs no change, answer only: {stop}\n\nRequest: {prompt}"
)
CONSISTENT = "Does this picture show all that the request asks for? Answer with yes or no.\n\nRequest: {prompt}"
QUESTIONS = {
    "think": "How would one plan this picture before drawing it?",
    "reflect": "How is the first picture to be improved to become the second?",
}


class Pictures(Protocol):
    """Where good pictures come from: `GivenPictures` or `DrawnPictures`."""

    def settings(self) -> dict:
        """What they depend on."""

    def check(self, prompts: list[Prompt]) -> None:
        """Refuse prompts that there is no picture of."""

    def pictures(self, prompts: list[Prompt], seeds: list[int]) -> list[np.ndarray]:
        """One uint8 `(H, W, 3)` a prompt."""


class Writer(Protocol):
    """Who answers questions about pictures: `writers.ChatWriter` or `writers.LocalWriter`."""

    def settings(self) -> dict:
        """What its answers depend on."""

    def check(self, texts: Sequence[str]) -> None:
        """Refuse texts that it cannot read as they stand."""

    def answer(self, asked: Sequence[Asked]) -> list[str | None]:
        """One text a question with its pictures, in order; None where it was cut."""


class Teacher:
    """Modes' texts by a `writer`, over `pictures` of each prompt (IRGL, arXiv 2509.06945 section 3.3; their wording is
    not published, this is ours).

    Args:
        pictures: where the good ones come from.
        writer: answers questions about pictures.
        stop: the answer that says a picture needs no change.
        words: length that is asked for.
        consistency: ask the writer whether a picture shows its prompt, and leave out what does not.
    """

    questions = QUESTIONS
    image_sizes: tuple[int, ...] = ()  # pictures of any size

    def __init__(
        self,
        pictures: Pictures,
        writer: Writer,
        stop: str = "No change needed.",
        words: Count = 200,
        consistency: bool = True,
    ):
        self.pictures, self.writer, self.stop, self.words, self.consistency = pictures, writer, stop, words, consistency

    def check(self, prompts: list[Prompt]) -> None:
        """Refuse prompts that there is no picture of, and those that the writer cannot read as they stand.

        Raises:
            UserError: one line that names the first.
        """
        self.pictures.check(prompts)
        self.writer.check([prompt.text for prompt in prompts])

    def settings(self) -> dict:
        parts = {"pictures": self.pictures.settings(), "writer": self.writer.settings()}
        return {"name": "teacher", **parts, "stop": self.stop, "words": self.words, "consistency": self.consistency}

    def initial(self, prompts: list[Prompt], seeds: list[int]) -> list[tuple[str | None, np.ndarray]]:
        """A plan and a good picture for each prompt; None where the writer was cut."""
        good = self.pictures.pictures(prompts, seeds)
        questions = [THINK.format(prompt=prompt.text, words=self.words) for prompt in prompts]
        asked = [(question, [image]) for question, image in zip(questions, good, strict=True)]
        return list(zip(self.writer.answer(asked), good, strict=True))

    def improve(
        self, prompts: list[Prompt], weak: np.ndarray, good: Sequence[np.ndarray], seeds: list[int]
    ) -> list[tuple[str | None, np.ndarray]]:
        """A reflection on each weak picture, and the good one; the weak one itself where it needs no change."""
        questions = [REFLECT.format(prompt=prompt.text, words=self.words, stop=self.stop) for prompt in prompts]
        pairs = list(zip(weak, good, strict=True))
        texts = self.writer.answer([(question, list(pair)) for question, pair in zip(questions, pairs, strict=True)])
        stays = [text is not None and says_stop(text, self.stop) for text in texts]
        return [(text, bad if same else better) for text, same, (bad, better) in zip(texts, stays, pairs, strict=True)]

    def inconsistent(self, prompts: list[Prompt], pictures: list[np.ndarray]) -> list[str | None]:
        """What speaks against each picture: the writer misses in it what its prompt asks for, or does not say."""
        if not self.consistency or not prompts:
            return [None] * len(prompts)
        questions = [CONSISTENT.format(prompt=prompt.text) for prompt in prompts]
        answers = self.writer.answer([(question, [image]) for question, image in zip(questions, pictures, strict=True)])
        words = [re.match(r"\W*(yes|no)\b", (answer or "").lower()) for answer in answers]
        why = {"yes": None, "no": "picture and prompt disagree"}
        neither = "asked whether it shows its prompt, the writer said neither yes nor no"
        return [why[word[1]] if word else neither for word in words]


class GivenPictures:
    """Pictures from a folder whose `images.jsonl` has a `prompt` and an `image` (a path in it) a line, as task=generate
    writes it.

    Raises:
        UserError: the file is missing or a line is not that.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.files: dict[str, str] = {}  # by prompt, in small letters
        file = self.path / "images.jsonl"
        if not file.is_file():
            raise UserError(f"{file} does not exist: good pictures come with a line of prompt and image each")
        for _, place, row in read_json_lines(file):
            for key in ("prompt", "image"):
                if fault := fault_of_text(row.get(key)):
                    raise UserError(f"{place}: not an object with 'prompt' and 'image': {key} {fault}")
            self.files.setdefault(row["prompt"].casefold(), row["image"])

    def settings(self) -> dict:
        return {"name": "given", "path": str(self.path.resolve())}

    def check(self, prompts: list[Prompt]) -> None:
        lacking = next((prompt for prompt in prompts if prompt.text.casefold() not in self.files), None)
        if lacking:
            raise UserError(f"{self.path} has no picture of {lacking.text!r}")
        files = (self.path / self.files[prompt.text.casefold()] for prompt in prompts)
        absent = next((file for file in files if not os.path.isfile(file)), None)
        if absent:
            raise UserError(f"{absent} is named in images.jsonl and does not exist")

    def pictures(self, prompts: list[Prompt], seeds: list[int]) -> list[np.ndarray]:
        """One uint8 `(H, W, 3)` a prompt.

        Raises:
            UserError: a file is no picture.
        """
        files = [self.path / self.files[prompt.text.casefold()] for prompt in prompts]
        return [np.asarray(read_image(file)) for file in files]


class DrawnPictures:
    """Pictures that a better model draws, with the same seeds every time."""

    def __init__(self, model: ImageModel, mode: str = "direct"):
        self.model, self.mode = model.to(own_gpu()), mode
        self.model.prepare()

    def settings(self) -> dict:
        return {"name": "drawn", "model": self.model.path, "mode": self.mode, "sampling": self.model.sampling()}

    def check(self, prompts: list[Prompt]) -> None:
        """Any prompt can be drawn."""

    def pictures(self, prompts: list[Prompt], seeds: list[int]) -> list[np.ndarray]:
        """One uint8 `(H, W, 3)` a prompt."""
        drawn = self.model.generate([prompt.text for prompt in prompts], seeds, mode=self.mode, fresh=False)
        return list(drawn.images)
