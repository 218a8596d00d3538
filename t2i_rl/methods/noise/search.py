"""`method=noise_search`: what noise optimisation is to be measured against, search without gradients (arXiv 2501.09732; best of N)."""

import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, Decay, check_arguments
from t2i_rl.core.seeding import derive_seed, row_normals
from t2i_rl.methods.noise.base import Case, NoiseMethod, Track
from t2i_rl.models.diffusion.noise_to_image import noise_to_image

ALGORITHMS = ("best_of_n", "zero_order")


class NoiseSearch(NoiseMethod):
    """Draws, judges, keeps the best; any reward will do.

    Args:
        algorithm: `best_of_n`, fresh noise every time, each exactly Gaussian; or `zero_order`, neighbours of the best so far of the given `cosine` with it,
            `neighbours` a round, on the same sphere.
        evaluations: pictures drawn a case, the first noise among them.

    Raises:
        UserError: an option outside its range.
    """

    def __init__(
        self,
        model,
        reward,
        watch,
        algorithm: str = "best_of_n",
        evaluations: Count = 51,
        neighbours: Count = 4,
        cosine: Decay = 0.95,
        **shared,
    ):
        super().__init__(model, reward, watch, **shared)
        self.algorithm, self.evaluations, self.neighbours, self.cosine = algorithm, evaluations, neighbours, cosine

    @staticmethod
    def check(options) -> None:
        """Refuse options that cannot be searched with.

        Raises:
            UserError: one line that names the option and its choices.
        """
        NoiseMethod.check(options)
        if options["algorithm"] not in ALGORITHMS:
            raise UserError(f"method.algorithm must be one of {', '.join(ALGORITHMS)}, not {options['algorithm']!r}")
        check_arguments(NoiseSearch, options, "method")

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
        if self.algorithm == "best_of_n":
            return fresh
        moved = self.cosine * self._pivots + (1 - self.cosine**2) ** 0.5 * fresh
        norms = [part.flatten(1).norm(dim=1) for part in (self._pivots, moved)]
        return moved * (norms[0] / norms[1]).view(-1, *[1] * (moved.ndim - 1))
