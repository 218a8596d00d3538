"""`method=noise_search`: the rivals of noise optimisation, which need no gradients (arXiv 2501.09732; best of N)."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Decay, check_arguments
from t2i_rl.core.seeding import derive_seed, row_normals
from t2i_rl.methods.noise.base import NoiseMethod
from t2i_rl.methods.noise.cases import Case, Track
from t2i_rl.models.diffusion.base import LatentDiffusion
from t2i_rl.models.diffusion.noise_to_image import noise_to_image

ALGORITHMS = ("best_of_n", "zero_order")


class NoiseSearch(NoiseMethod):
    """Draws, judges, keeps the best; any reward will do.

    Args:
        algorithm: `best_of_n`, fresh noise every time, each exactly Gaussian; or `zero_order`, neighbours of the best
            so far of the given `cosine` with it, `neighbours` a round, on the same sphere.
        evaluations: pictures drawn a case, the first noise among them.

    Raises:
        UserError: an option outside its range.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        reward: Reward,
        watch: Mapping[str, Reward],
        algorithm: str = "best_of_n",
        evaluations: Count = 51,
        neighbours: Count = 4,
        cosine: Decay = 0.95,
        **shared: Any,
    ):
        super().__init__(model, reward, watch, **shared)
        self.algorithm, self.evaluations, self.neighbours, self.cosine = algorithm, evaluations, neighbours, cosine

    @staticmethod
    def check(options: Mapping) -> None:
        """Refuse options that cannot be searched with.

        Raises:
            UserError: one line that names the option and its choices.
        """
        NoiseMethod.check(options)
        if options["algorithm"] not in ALGORITHMS:
            raise UserError(f"method.algorithm must be one of {', '.join(ALGORITHMS)}, not {options['algorithm']!r}")
        check_arguments(NoiseSearch, options, "method")

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """See `Method.check_run`."""
        super().check_run(cfg, training)
        if cfg.regularizer.terms or cfg.regularizer.constraint:
            raise UserError(
                f"regularizer= holds noise that climbs, and {cls.__name__} draws its noise from a Gaussian: leave it "
                "out"
            )

    @property
    def length(self) -> int:
        return self.evaluations

    @torch.no_grad()
    def search(self, cases: list[Case]) -> list[Track]:
        tracks, text, empty = [Track(case) for case in cases], self.text_of(cases), self.empty_of(len(cases))
        noise = self.first_noise(cases)
        for step in range(self.evaluations):
            if step:
                noise = self._proposed(tracks, step)
            pixels = noise_to_image(self.model, noise, text, empty, self.eta, last_step_noise=self.last_step_noise)
            self.note(tracks, step, noise, pixels, self.target_of(pixels, cases))
            if step % self.neighbours == 0:
                self._pivots = torch.stack([track.noises["best"] for track in tracks]).to(self.device)
        return tracks

    def _proposed(self, tracks: list[Track], step: int) -> torch.Tensor:
        seeds = [derive_seed(track.case.seed, "search", step) for track in tracks]
        fresh = row_normals(seeds, self.noise_shape()).to(self.device)
        return fresh if self.algorithm == "best_of_n" else neighbours_of(self._pivots, fresh, self.cosine)


def neighbours_of(pivots: torch.Tensor, fresh: torch.Tensor, cosine: float) -> torch.Tensor:
    """Noise `(B, ...)` of about the given cosine with each pivot, in the direction of `fresh` noise, and of the pivot's
    own length."""
    moved = cosine * pivots + (1 - cosine**2) ** 0.5 * fresh
    lengths, moved_lengths = pivots.flatten(1).norm(dim=1), moved.flatten(1).norm(dim=1)
    return moved * (lengths / moved_lengths).view(-1, *[1] * (moved.ndim - 1))
