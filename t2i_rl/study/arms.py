"""Arms x seeds of one question: where each run lies, what it is asked to do, and what it measured."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from t2i_rl.core.errors import UserError
from t2i_rl.core.places import PACKAGE
from t2i_rl.evaluation.diversity import diversity_by_prompt
from t2i_rl.evaluation.records import read_stage
from t2i_rl.evaluation.stats import compare_over_seeds, seed_difference
from t2i_rl.study.jobs import Job
from t2i_rl.study.queue import run_jobs

RUN = PACKAGE.parent / "run.py"
STUDENT = "overall, Student"
Records = list[list[dict]]  # of each seed, in order of seeds


@dataclass(frozen=True)
class Study:
    """Arms x seeds: every arm is a set of overrides of `run.py`, and runs once for every seed.

    Attributes:
        folder: the runs lie in `<folder>/<arm>/seed_<n>`.
        arms: overrides by the arm's name.
        seeds: three or more for intervals.
        shared: overrides that all arms have.
        base, trained: the stages that are compared. The base is drawn once a seed, and copied into the other arms'
            runs; None where the arms have no base in common.
        control: the arm that the others are compared with, at equal seeds and prompts.
        root: the folder that runs start in.

    Raises:
        UserError: two arms share a folder, a seed stands twice or none at all, or the control is no arm.
    """

    folder: Path
    arms: Mapping[str, Sequence[str]]
    seeds: Sequence[int] = (0, 1, 2)
    shared: Sequence[str] = ()
    base: str | None = "base_plan"
    trained: str = "trained_plan"
    control: str | None = None
    root: Path = field(default_factory=Path.cwd)

    def __post_init__(self):
        folders: dict[str, str] = {}
        for arm in self.arms:
            other = folders.setdefault(folder_name(arm), arm)
            if other != arm:
                raise UserError(f"the arms {other!r} and {arm!r} share the folder {folder_name(arm)}: rename one")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"a study needs seeds, each once, not {list(self.seeds)}")
        if self.control is not None and self.control not in self.arms:
            raise UserError(f"the control {self.control!r} is no arm: choose from {', '.join(self.arms)}")

    def run_folder(self, arm: str, seed: int) -> Path:
        return (self.root / self.folder / folder_name(arm) / f"seed_{seed}").absolute()

    def job(self, arm: str, seed: int, *settings: str, **how) -> Job:
        """The run of one arm and seed.

        Args:
            settings: overrides that differ from seed to seed, as a path of another job does.
            how: attributes of the `Job` that are not its defaults (`takes`, `needs`, `result`, `drawn`).
        """
        folder = self.run_folder(arm, seed)
        settings = (*self.shared, *self.arms[arm], *settings, f"seed={seed}", f"hydra.run.dir={folder}")
        if self.base is not None:
            others = [self.run_folder(other, seed) for other in self.arms if other != arm]
            how = {"drawn": tuple(other / "evaluation" / self.base for other in others), **how}
        return Job(f"{arm}, seed {seed}", folder, (str(RUN), *settings), root=self.root, **how)

    def jobs(self, arms: Sequence[str] | None = None) -> list[Job]:
        """The runs of these arms (of all, where none is named), arm by arm."""
        return [self.job(arm, seed) for arm in arms or self.arms for seed in self.seeds]

    def run(self, workers: int = 2, arms: Sequence[str] | None = None) -> None:
        """Run whatever is not done. Raises: see `run_jobs`."""
        run_jobs(self.jobs(arms), workers)

    def records(self, arm: str, stage: str) -> Records:
        """What one stage of an arm drew, seed by seed. Raises: see `read_records`."""
        return [list(read_stage(self.run_folder(arm, seed), stage).values()) for seed in self.seeds]

    def features(self, arm: str, stage: str) -> list[np.ndarray]:
        """The image features (N, D) of one stage, seed by seed, in the order of its records."""
        runs = [self.run_folder(arm, seed) for seed in self.seeds]
        return [np.load(run / "evaluation" / stage / "features.npy") for run in runs]

    def diversity(self, arm: str, stage: str) -> list[float]:
        """Mean cosine distance between the images of one prompt, seed by seed."""
        values = []
        for rows, features in zip(self.records(arm, stage), self.features(arm, stage), strict=True):
            by_prompt = diversity_by_prompt(features, [row["prompt_id"] for row in rows])
            values.append(float(by_prompt["diversity"].mean()))
        return values

    def logged(self, arm: str, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one logged metric, where it was logged.

        Raises:
            UserError: the run has no log, or never logged this.
        """
        path = self.run_folder(arm, seed) / "metrics.csv"
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(float(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
        if not rows:
            raise UserError(f"{path} has no values of {name}")
        steps, values = np.array(rows).T
        return steps, values

    def against_base(self, arm: str) -> dict[str, dict]:
        """What training changed: `differences` of the arm's stages."""
        return differences(self.records(arm, self.base), self.records(arm, self.trained))

    def against(self, control: str, arm: str) -> dict[str, dict]:
        """What is due to the arm alone: `differences` of the trained stages at equal seeds and prompts."""
        return differences(self.records(control, self.trained), self.records(arm, self.trained))


def folder_name(arm: str) -> str:
    """The arm's name without what a shell or Hydra would read as more than a letter."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", arm).strip("_")


def differences(before: Records, after: Records) -> dict[str, dict]:
    """Every metric's paired difference `after - before`, image by image within a seed, averaged over seeds.

    The intervals are those of the two-level bootstrap (`compare_over_seeds`); `overall, Student` is `overall` once
    more with Student's interval over seeds (`seed_interval`).

    Raises:
        UserError: the sides do not hold the same images.
    """
    pairs = list(zip(before, after, strict=True))
    by_seed = [compare_over_seeds([pair], resamples=1)["overall"]["difference"] for pair in pairs]
    return {**compare_over_seeds(pairs), STUDENT: seed_difference(by_seed)}
