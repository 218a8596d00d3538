"""IRGL data for a prompt list: the model draws weakly, a teacher thinks, reflects and shows the better picture."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from t2i_rl.core.contracts import ImageModel
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_object, write_atomic
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.numbers import Count, Seed, Share, check_arguments
from t2i_rl.core.progress import ProgressCounter
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.irg.rounds import says_stop
from t2i_rl.methods.irg.rows import Material, row_of
from t2i_rl.methods.irg.toy_format import write_shard
from t2i_rl.methods.irg.trajectory import MODES, Trajectory
from t2i_rl.models.autoregressive.segments import Segment

# The version of what is made. 2: no held-out pair of objects is learnt; 3: a picture with nothing wrong is its own
# better one; 4: the model's own thought is checked too.
RULES = 4
Fits = Callable[[Sequence[Segment]], bool]


class Teaches(Protocol):
    """Who thinks, reflects and shows the better picture: `irg.world.World` or `irg.teachers.Teacher`.

    stop: how a reflection ends that finds nothing wrong.
    questions: what is asked for a thought (`think`) and for a reflection (`reflect`).
    image_sizes: sides in pixels of the pictures that it reads; empty for any.
    """

    stop: str
    questions: dict[str, str]
    image_sizes: tuple[int, ...]

    def check(self, prompts: list[Prompt]) -> None:
        """Refuse prompts that it cannot teach."""

    def settings(self) -> dict:
        """What it says depends on."""

    def inconsistent(self, prompts: list[Prompt], pictures: list[np.ndarray]) -> list[str | None]:
        """What speaks against each picture of its prompt; None where nothing does."""

    def initial(self, prompts: list[Prompt], seeds: list[int]) -> Sequence[tuple[str | None, np.ndarray]]:
        """A plan and a good picture for each prompt."""

    def improve(
        self, prompts: list[Prompt], weak: np.ndarray, good: Sequence[np.ndarray], seeds: list[int]
    ) -> Sequence[tuple[str | None, np.ndarray]]:
        """A reflection on each weak picture uint8 `(B, H, W, 3)`, and the better picture."""


@dataclass
class Maker:
    """Writes a folder in the published format, a shard of prompts at a time; a shard that is finished is never made
    again.

    Args:
        teacher: see `Teaches`.
        shard_size: prompts a shard: what a kill can lose.
        batch_size: pictures drawn together.
        right_share: of the weak pictures that the teacher finds nothing wrong with, the share that is kept, to teach
            when to stop.
        words: shortest and longest text that is kept, in words.
        ascii_share: least share of a text's letters that are plain Latin ones; 0 keeps every language.
        seed: together with prompt text it decides every draw.

    Raises:
        UserError: an option outside its range.
    """

    teacher: Teaches
    shard_size: Count = 256
    batch_size: Count = 64
    right_share: Share = 1.0
    words: tuple[Count, Count] = (1, 600)
    ascii_share: Share = 0.9
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_arguments(Maker, vars(self), "maker")
        shortest, longest = self.words
        self.words = (shortest, longest)  # a config has a list
        if shortest > longest:
            raise UserError(f"words must be the shortest and the longest text, like [1, 600], not {list(self.words)}")

    def check(self, image_size: int) -> None:
        """Whether the teacher reads pictures of the size that the model draws.

        Raises:
            UserError: it does not.
        """
        sizes = self.teacher.image_sizes
        if sizes and image_size not in sizes:
            raise UserError(
                f"the teacher ({type(self.teacher).__name__}) reads images of {' or '.join(map(str, sizes))} pixels, "
                f"but this model draws {image_size}x{image_size}: take task=make_irgl task/teacher=chat or local, then "
                "data=irgl"
            )

    def make(self, folder: Path, model: ImageModel, prompts: list[Prompt], fits: Fits | None = None) -> dict:
        """Make what is not there yet; returns the manifest: settings, counts a mode, and what was left out, and why; a
        row that does not `fits(segments)` is.

        Raises:
            UserError: the folder was made with other settings, or the teacher cannot teach a prompt.
        """
        folder = Path(folder)
        self.teacher.check(prompts)
        settings = self.settings(model, prompts)
        _check_same(folder, settings)
        write_atomic(folder / "settings.json", json.dumps(settings, indent=1))
        model.prepare()
        digests: set[str] = set()
        starts, seeds = range(0, len(prompts), self.shard_size), self.seeds(prompts)
        records = [folder / "shards" / f"{number:05d}.json" for number in range(len(starts))]
        parts = {record: slice(first, first + self.shard_size) for first, record in zip(starts, records, strict=True)}
        ready = sum(len(prompts[part]) for record, part in parts.items() if record.exists())
        with ProgressCounter("making trajectories", len(prompts), "prompt", ready) as progress:
            for record, part in parts.items():
                if not record.exists():
                    self._shard(folder, record, model, prompts[part], seeds[part], digests, fits, progress)
                digests |= set(read_object(record, "hashes")["hashes"])
        manifest = self._manifest(folder, settings, len(starts))
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1))
        return manifest

    def seeds(self, prompts: Sequence[Prompt]) -> list[int]:
        """A seed a prompt, by its text and how often that came before: a prompt that comes again is drawn anew."""
        times: Counter[str] = Counter()
        seeds = []
        for prompt in prompts:
            seeds.append(derive_seed(self.seed, "irgl", prompt.text, times[prompt.text]))
            times[prompt.text] += 1
        return seeds

    def settings(self, model: ImageModel, prompts: Sequence[Prompt]) -> dict:
        """What a row depends on."""
        texts = hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()
        return {
            "rules": RULES,
            **{name: value for name, value in vars(self).items() if name not in ("teacher", "batch_size")},
            "words": list(self.words),
            "teacher": self.teacher.settings(),
            "sampling": model.sampling(),
            "weights_sha256": weights_sha256(model, adapters=False),
            "prompts": len(prompts),
            "prompts_sha256": texts,
        }

    def _shard(
        self,
        folder: Path,
        record: Path,
        model: ImageModel,
        prompts: list[Prompt],
        seeds: list[int],
        digests: set[str],
        fits: Fits | None,
        progress: ProgressCounter,
    ) -> None:
        """Rows of these prompts, but for those whose digest is there already; then the record that they are whole."""
        rows: dict[str, list[Trajectory]] = {mode: [] for mode in MODES}
        left_out: Counter[str] = Counter()
        hashes = []
        for first in range(0, len(prompts), self.batch_size):
            part = slice(first, first + self.batch_size)
            materials = self._materials(model, prompts[part], seeds[part])
            verdicts: dict[int, str | None] = {}
            refused = {half: self._refused(half, materials, seeds[part], verdicts) for half in ("initial", "improving")}
            for number, material in enumerate(materials):
                for mode in MODES:
                    segments = row_of(mode, material, self.teacher.questions)
                    why = refused[mode.split("_")[0]][number] or self._stands_on_unfit(segments)
                    digest = digest_of(mode, segments) if why is None else ""
                    if digest in digests:
                        why = "duplicate"
                    if why is None and fits is not None and not fits(segments):
                        why = "longer than the model's positions"
                    if why is not None:
                        left_out[f"{mode}: {why}"] += 1
                        continue
                    digests.add(digest)
                    hashes.append(digest)
                    rows[mode].append(Trajectory(segments))
            progress.advance(len(materials))
        for mode, trajectories in rows.items():
            if trajectories:
                write_shard(folder / mode / f"{record.stem}.parquet", trajectories)
        counts = {mode: len(trajectories) for mode, trajectories in rows.items()}
        write_atomic(record, json.dumps({"counts": counts, "left_out": dict(left_out), "hashes": hashes}))

    def _materials(self, model: ImageModel, prompts: list[Prompt], seeds: list[int]) -> list[Material]:
        texts = [prompt.text for prompt in prompts]
        mode = "plan" if model.family == "autoregressive" else "direct"
        weak = model.generate(texts, seeds, mode=mode, fresh=False)
        thoughts, good = zip(*self.teacher.initial(prompts, seeds), strict=True)
        base_thoughts = weak.plans if mode == "plan" else thoughts
        reflections, better = zip(*self.teacher.improve(prompts, weak.images, good, seeds), strict=True)
        columns = (prompts, thoughts, good, base_thoughts, weak.images, reflections, better)
        return [Material(*row) for row in zip(*columns, strict=True)]

    def _refused(
        self, half: str, materials: list[Material], seeds: list[int], verdicts: dict[int, str | None]
    ) -> list[str | None]:
        """Why the rows of the `initial` or the `improving` modes are left out of each prompt's material, if they are;
        `verdicts` keeps what was said of each picture, by the `id` of its array."""
        improving = half == "improving"
        texts = [material.reflection if improving else material.thought for material in materials]
        pictures = [material.better if improving else material.good for material in materials]
        why = [self._unfit(text, seed if improving else None) for text, seed in zip(texts, seeds, strict=True)]
        fit = [number for number, reason in enumerate(why) if reason is None]
        unseen = [number for number in fit if id(pictures[number]) not in verdicts]
        reasons = self.teacher.inconsistent([materials[i].prompt for i in unseen], [pictures[i] for i in unseen])
        verdicts |= {id(pictures[number]): reason for number, reason in zip(unseen, reasons, strict=True)}
        for number in fit:
            why[number] = verdicts[id(pictures[number])]
        return why

    def _stands_on_unfit(self, segments: Sequence[Segment]) -> str | None:
        """Why a row cannot stand on the thought that is its context, the model's own, if it cannot."""
        own = [segment.text for segment in segments if segment.role == "think" and not segment.loss]
        wrong = self._unfit(own[0], None) if own else None
        return wrong and f"{wrong} that the model thought itself"

    def _unfit(self, text: str | None, seed: int | None) -> str | None:
        """Why a thought, or with a `seed` a reflection, is not to be learnt; None is one whose writer was cut."""
        if text is None:
            return "the writer was cut: raise max_tokens and name another folder to have them"
        if seed is not None and says_stop(text, self.teacher.stop):
            if np.random.default_rng(derive_seed(seed, "right")).random() >= self.right_share:
                return "nothing wrong with the weak picture"
        elif not self.words[0] <= len(text.split()) <= self.words[1]:
            return "length of the text"
        letters = [letter for letter in text if letter.isalpha()]
        if letters and sum(letter.isascii() for letter in letters) < self.ascii_share * len(letters):
            return "language of the text"
        return None

    def _manifest(self, folder: Path, settings: dict, shards: int) -> dict:
        parts = [
            read_object(folder / "shards" / f"{number:05d}.json", "counts", "left_out") for number in range(shards)
        ]
        counts: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        for part in parts:
            counts.update(part["counts"])
            left_out.update(part["left_out"])
        return {"settings": settings, "shards": shards, "counts": dict(counts), "left_out": dict(left_out)}


def digest_of(mode: str, segments: Sequence[Segment]) -> str:
    """The same for rows that are the same."""
    digest = hashlib.sha256(mode.encode())
    for segment in segments:
        if segment.image is not None:
            digest.update(segment.image.tobytes())
        else:
            assert segment.text is not None  # it has passed `Maker._unfit`
            digest.update(segment.text.encode())
    return digest.hexdigest()[:16]


def _check_same(folder: Path, settings: dict) -> None:
    if not (folder / "settings.json").exists():
        return
    before = read_object(folder / "settings.json")
    differing = [key for key in settings if before.get(key) != settings[key]]
    if differing:
        raise UserError(
            f"{folder} was made with other settings ({', '.join(differing)}): name another folder, or delete that one"
        )
