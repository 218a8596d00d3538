"""IRGL data for a prompt list: the model draws weakly, a teacher thinks, reflects and shows the better picture (specification section 2.5)."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_object, write_atomic
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.numbers import Count, Seed, Share, check_arguments
from t2i_rl.core.progress import Progress
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.irg.rounds import says_stop
from t2i_rl.methods.irg.rows import Material, row_of
from t2i_rl.methods.irg.toy_format import write_shard
from t2i_rl.methods.irg.trajectory import MODES, Trajectory
from t2i_rl.models.autoregressive.segments import Segment

RULES = 4  # of what is made; 2: no held-out pair of objects is learnt; 3: a picture with nothing wrong is its own better one; 4: the model's own thought is checked too


@dataclass
class Maker:
    """Writes a folder in the published format, a shard of prompts at a time; a shard that is finished is never made again.

    Args:
        teacher: `initial(prompts, seeds)` and `improve(prompts, weak, good, seeds)`, each a text and a picture a prompt, and `inconsistent(prompts, pictures)`; see
            `irg.world.World` and `irg.teachers.Teacher`.
        shard_size: prompts a shard: what a kill can lose.
        batch_size: pictures drawn together.
        right_share: of the weak pictures that the teacher finds nothing wrong with, the share that is kept, to teach when to stop.
        words: shortest and longest text that is kept, in words.
        ascii_share: least share of a text's letters that are plain Latin ones; 0 keeps every language.
        seed: together with prompt text it decides every draw.

    Raises:
        UserError: an option outside its range.
    """

    teacher: object
    shard_size: Count = 256
    batch_size: Count = 64
    right_share: Share = 1.0
    words: tuple[Count, Count] = (1, 600)
    ascii_share: Share = 0.9
    seed: Seed = 0

    def __post_init__(self):
        check_arguments(Maker, vars(self), "maker")
        self.words = tuple(self.words)
        if self.words[0] > self.words[1]:
            raise UserError(f"words must be the shortest and the longest text, like [1, 600], not {list(self.words)}")

    def check(self, image_size: int) -> None:
        """Whether the teacher reads pictures of the size that the model draws.

        Raises:
            UserError: it does not.
        """
        sizes = self.teacher.image_sizes
        if sizes and image_size not in sizes:
            raise UserError(
                f"the teacher ({type(self.teacher).__name__}) reads images of {' or '.join(map(str, sizes))} pixels, but "
                f"this model draws {image_size}x{image_size}: take task=make_irgl task/teacher=chat or local, then data=irgl"
            )

    def make(self, folder: Path, model, prompts: Sequence[Prompt], fits: Callable | None = None) -> dict:
        """Make what is not there yet; returns the manifest: settings, counts a mode, and what was left out, and why; a row that does not `fits(segments)` is.

        Raises:
            UserError: the folder was made with other settings, or the teacher cannot teach a prompt.
        """
        folder = Path(folder)
        self.teacher.check(prompts)
        settings = self.settings(model, prompts)
        _check_same(folder, settings)
        write_atomic(folder / "settings.json", json.dumps(settings, indent=1))
        model.prepare()
        seen: set[str] = set()
        starts, seeds = range(0, len(prompts), self.shard_size), self.seeds(prompts)
        places = [folder / "shards" / f"{number:05d}.json" for number in range(len(starts))]
        ready = sum(
            len(prompts[first : first + self.shard_size]) for first, place in zip(starts, places) if place.exists()
        )
        with Progress("making trajectories", len(prompts), "prompt", ready) as progress:
            for number, (first, place) in enumerate(zip(starts, places, strict=True)):
                if not place.exists():
                    part = slice(first, first + self.shard_size)
                    self._shard(folder, f"{number:05d}", model, prompts[part], seeds[part], seen, place, fits, progress)
                seen |= set(read_object(place, "hashes")["hashes"])
        manifest = self._manifest(folder, settings, len(starts))
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1))
        return manifest

    def seeds(self, prompts: Sequence[Prompt]) -> list[int]:
        """A seed a prompt, by its text and how often that came before: a prompt that comes again is drawn anew."""
        times, found = Counter(), []
        for prompt in prompts:
            found.append(derive_seed(self.seed, "irgl", prompt.text, times[prompt.text]))
            times[prompt.text] += 1
        return found

    def settings(self, model, prompts: Sequence[Prompt]) -> dict:
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
        name: str,
        model,
        prompts: list[Prompt],
        seeds: list[int],
        seen: set[str],
        place: Path,
        fits: Callable | None,
        progress: Progress,
    ) -> None:
        rows: dict[str, list[Trajectory]] = {mode: [] for mode in MODES}
        left_out, hashes = Counter(), []
        for first in range(0, len(prompts), self.batch_size):
            part = slice(first, first + self.batch_size)
            made = self._material(model, prompts[part], seeds[part])
            asked: dict[int, str | None] = {}
            refused = {half: self._refused(half, made, seeds[part], asked) for half in ("initial", "improving")}
            for number, material in enumerate(made):
                for mode in MODES:
                    segments = row_of(mode, material, self.teacher.questions)
                    why = refused[mode.split("_")[0]][number] or self._stands_on_unfit(segments)
                    digest = digest_of(mode, segments) if why is None else ""
                    if digest in seen:
                        why = "duplicate"
                    if why is None and fits is not None and not fits(segments):
                        why = "longer than the model's positions"
                    if why is not None:
                        left_out[f"{mode}: {why}"] += 1
                        continue
                    seen.add(digest)
                    hashes.append(digest)
                    rows[mode].append(Trajectory(segments))
            progress.advance(len(made))
        for mode, trajectories in rows.items():
            if trajectories:
                write_shard(folder / mode / f"{name}.parquet", trajectories)
        counts = {mode: len(trajectories) for mode, trajectories in rows.items()}
        write_atomic(place, json.dumps({"counts": counts, "left_out": dict(left_out), "hashes": hashes}))

    def _material(self, model, prompts: list[Prompt], seeds: list[int]) -> list[Material]:
        texts = [prompt.text for prompt in prompts]
        mode = "plan" if model.family == "autoregressive" else "direct"
        weak = model.generate(texts, seeds, mode=mode, fresh=False)
        thoughts, good = zip(*self.teacher.initial(prompts, seeds), strict=True)
        base_thoughts = weak.plans if mode == "plan" else thoughts
        reflections, better = zip(*self.teacher.improve(prompts, weak.images, good, seeds), strict=True)
        return [Material(*each) for each in zip(prompts, thoughts, good, base_thoughts, weak.images, reflections, better, strict=True)]  # fmt: skip

    def _refused(self, half: str, made: list[Material], seeds: list[int], asked: dict[int, str | None]) -> list[str | None]:  # fmt: skip
        """Why the rows of the `initial` or the `improving` modes are left out of each prompt's material, if they are; `asked` keeps the verdict on each picture."""
        improving = half == "improving"
        texts = [each.reflection if improving else each.thought for each in made]
        pictures = [each.better if improving else each.good for each in made]
        why = [self._unfit(text, seed if improving else None) for text, seed in zip(texts, seeds, strict=True)]
        fit = [number for number, reason in enumerate(why) if reason is None]
        left = [number for number in fit if id(pictures[number]) not in asked]
        found = self.teacher.inconsistent([made[i].prompt for i in left], [pictures[i] for i in left])
        asked |= {id(pictures[number]): reason for number, reason in zip(left, found, strict=True)}
        for number in fit:
            why[number] = asked[id(pictures[number])]
        return why

    def _stands_on_unfit(self, segments: Sequence[Segment]) -> str | None:
        """Why a row cannot stand on the thought that is its context, the model's own, if it cannot."""
        own = [each.text for each in segments if each.role == "think" and not each.loss]
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
        counts, left_out = Counter(), Counter()
        for part in parts:
            counts.update(part["counts"])
            left_out.update(part["left_out"])
        return {"settings": settings, "shards": shards, "counts": dict(counts), "left_out": dict(left_out)}


def digest_of(mode: str, segments: Sequence[Segment]) -> str:
    """The same for rows that are the same."""
    digest = hashlib.sha256(mode.encode())
    for segment in segments:
        digest.update(segment.text.encode() if segment.kind == "text" else segment.image.tobytes())
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
