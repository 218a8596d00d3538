"""The judge itself as the reward: what an intrinsic reward is measured against."""

import torch

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.scene import CANVASES, LARGE_SHAPES


class Oracle(Reward):
    """The exact judge of `shapes`.

    Args:
        kind: `strict` is 0 or 1, `score` the partial credit in [0, 1], `mixed` their mean.

    Raises:
        UserError: an unknown kind.
    """

    needs_meta = ("include",)
    image_sizes = CANVASES
    judge_of = "shapes"  # the benchmark that judges by the same

    def __init__(self, kind: str = "strict"):
        if kind not in ("strict", "score", "mixed"):
            raise UserError(f"reward.kind must be strict, score or mixed, not {kind!r}")
        self.kind = kind

    def refuses(self, prompt: Prompt) -> str | None:
        """Why a prompt cannot be judged, if it cannot: the world knows its own shapes only."""
        strange = [clause["class"] for clause in prompt.meta["include"] if clause["class"] not in LARGE_SHAPES]
        return f"{strange[0]!r} is no shape of this world" if strange else None

    def __call__(self, drawn: Drawn) -> RewardOutput:
        detections = detect(drawn.images)
        verdicts = [judge(prompt.meta, items) for prompt, items in zip(drawn.prompts, detections, strict=True)]
        strict = torch.tensor([float(verdict.strict) for verdict in verdicts], dtype=torch.float64)
        score = torch.tensor([verdict.score for verdict in verdicts], dtype=torch.float64)
        total = {"strict": strict, "score": score, "mixed": (strict + score) / 2}[self.kind]
        return RewardOutput(total, {"strict": strict, "score": score})
