"""A differentiable stand-in for the oracle: how far a recogniser agrees with a prompt."""

from functools import cache

import torch
import torch.nn.functional as F

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Factor
from t2i_rl.core.prompts import Prompt
from t2i_rl.rewards.pixels import to_unit
from t2i_rl.shapes.recognizer import COLOR_NAMES, GRID, Recognizer
from t2i_rl.shapes.scene import LARGE_SHAPES

LARGEST = 6  # counts are told apart up to here


class SoftOracle(Reward):
    """Sum of log-probabilities, in nats: of each clause's count, of the count of all, of relations.

    Cells are taken as independent. It is a score and no log-probability of the verdict, since the
    counts are not independent of one another. It can be hacked, and that is what it is for: the
    exact oracle beside it cannot.

    Args:
        path: a folder of `task=make_recognizer`.
        floor: added to each probability, so that one hopeless clause does not drown the others.
    """

    differentiable = True
    needs_meta = ("include",)

    def __init__(self, path: str, floor: Factor = 1e-9):
        self.recognizer, self.floor = Recognizer.load(path), floor
        self.image_sizes = (self.recognizer.size,)

    def refuses(self, prompt: Prompt) -> str | None:
        """Why a prompt cannot be judged, if it cannot."""
        for clause in prompt.meta["include"]:
            if clause["class"] not in LARGE_SHAPES:
                return f"{clause['class']!r} is no shape of this world"
            if {"texture", "size"} & set(clause):
                return "the recogniser reads shapes and colours, neither textures nor sizes"
        count = sum(clause["count"] for clause in prompt.meta["include"])
        if count > LARGEST:
            return f"the recogniser counts to {LARGEST}, not to {count}"
        return None

    def __call__(self, drawn: Drawn) -> RewardOutput:
        """Of uint8 images."""
        with torch.no_grad():
            total = self.score_pixels(to_unit(drawn.images), drawn.prompts)
        return RewardOutput(total.double().cpu())

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        """Scores `(B,)`, float32, with gradients to float32 pixels `(B, 3, H, W)` in [0, 1]."""
        present, shape, color = self.recognizer.to(pixels.device)(pixels)
        present, of_shape, of_color = present.sigmoid(), shape.softmax(-1), color.softmax(-1)
        fits = [self._fits(*row) for row in zip(present, of_shape, of_color, prompts, strict=True)]
        clause_counts = [[clause["count"] for clause in prompt.meta["include"]] for prompt in prompts]
        # all sets of events in one call: of each prompt those of its clauses, then that of any
        # object
        events = [fit for clause_fits, cells in zip(fits, present, strict=True) for fit in [*clause_fits, cells]]
        counts = [count for row in clause_counts for count in [*row, sum(row)]]
        of_counts = exactly(torch.stack(events), counts).split([len(row) + 1 for row in clause_counts])
        scores = []
        for of_count, clause_fits, prompt in zip(of_counts, fits, prompts, strict=True):
            factors = torch.cat([of_count, *self._relations(clause_fits, prompt)])
            scores.append((factors + self.floor).log().sum())
        return torch.stack(scores)

    @staticmethod
    def _fits(
        present: torch.Tensor, of_shape: torch.Tensor, of_color: torch.Tensor, prompt: Prompt
    ) -> list[torch.Tensor]:
        """For each clause, the probability `(64,)` that a cell holds what it names."""
        fits = []
        for clause in prompt.meta["include"]:
            fit = present * of_shape[:, LARGE_SHAPES.index(clause["class"])]
            fits.append(fit * of_color[:, COLOR_NAMES.index(clause["color"])] if "color" in clause else fit)
        return fits

    @staticmethod
    def _relations(fits: list[torch.Tensor], prompt: Prompt) -> list[torch.Tensor]:
        """The probability `(1,)` of each relation that a clause names."""
        pairs = zip(fits, prompt.meta["include"], strict=True)
        positions = [(fit, *clause["position"]) for fit, clause in pairs if "position" in clause]
        return [related(fit, fits[target], relation)[None] for fit, relation, target in positions]


def exactly(probabilities: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The probability `(E,)` that exactly `counts[e]` of independent events happen.

    Each of the sets `(E, N)` is Poisson binomial.

    Raises:
        UserError: a count above 6.
    """
    if max(counts) > LARGEST:
        raise UserError(f"the soft oracle counts to {LARGEST}, not to {max(counts)}")
    state = F.pad(torch.ones_like(probabilities[:, :1]), (0, LARGEST))
    for p in probabilities.split(1, dim=1):
        state = state * (1 - p) + p * F.pad(state[:, :-1], (1, 0))
    return state.gather(1, torch.tensor(counts, device=state.device)[:, None])[:, 0]


def related(a: torch.Tensor, b: torch.Tensor, relation: str) -> torch.Tensor:
    """Probability that an object drawn from cells `a` `(N,)` lies so to one drawn from `b`.

    The axis of the larger offset decides.
    """
    holds = _holding(relation).to(a)
    return (a @ holds @ b) / (a.sum() * b.sum()).clamp(min=1e-9)


@cache
def _holding(relation: str) -> torch.Tensor:
    """Whether the offset from cell j to cell i points a relation's way by 45 degrees, `(N, N)`."""
    rows, columns = torch.arange(GRID * GRID) // GRID, torch.arange(GRID * GRID) % GRID
    dx, dy = columns[:, None] - columns[None], rows[:, None] - rows[None]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return ((along > 0) & (along >= across.abs())).float()
