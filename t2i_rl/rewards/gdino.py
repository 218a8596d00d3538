"""GroundingDINO as a reward: are the objects there, as many as asked for, and where they should be (T2I-R1's detection reward)."""

import torch

from t2i_rl.errors import UserError
from t2i_rl.loading import load_model, load_part
from t2i_rl.prompts import Prompt
from t2i_rl.rewards.boxes import COMPATS, NEAR, SIDES, Detections, detection_score, nouns_of
from t2i_rl.rewards.output import RewardOutput
from t2i_rl.rollout.buffer import Rollout


class GroundingDino:
    """`detection_score` of what GroundingDINO finds for the nouns of the raw prompt (T2I-R1 section 3.4; arXiv 2303.05499).

    The caption is the nouns with full stops between. A box's score for a noun is the greatest sigmoid over the noun's tokens; a box
    counts for its best noun if that score is above `box_threshold`.

    Args:
        path: a checkpoint of transformers' GroundingDinoForObjectDetection.
        compat: `paper`, or `released`: T2I-R1's scorer with its defects (docs/rewards.md), among them that a noun of three words or
            more is never found.
        near_pixels: how close "near" is.

    Raises:
        UserError: an unknown `compat`; a checkpoint that cannot be loaded.
    """

    needs_images = True
    needs_meta = ("nouns",)
    distribution = None

    def __init__(
        self,
        path: str,
        compat: str = "paper",
        box_threshold: float = 0.3,
        near_pixels: float = 150.0,
        batch_size: int = 8,
        dtype: str = "float32",
        device: str | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoImageProcessor, AutoTokenizer, GroundingDinoForObjectDetection

        if compat not in COMPATS:
            raise UserError(f"reward.compat must be one of {', '.join(COMPATS)}, not {compat!r}")
        self.compat, self.box_threshold, self.near_pixels = compat, box_threshold, near_pixels
        self.batch_size = batch_size
        self.model = load_model(
            GroundingDinoForObjectDetection, path, kind="grounding-dino", dtype=dtype, device=device, revision=revision
        )
        self.tokenizer = load_part(AutoTokenizer, path, revision)
        self.pictures = load_part(AutoImageProcessor, path, revision)

    def refuses(self, prompt: Prompt) -> str | None:
        """Nothing to look for, a relation that has no rule, or more nouns than the model reads."""
        relation = (prompt.meta.get("spatial_info") or {}).get("locality")
        if relation not in (None, *SIDES, *NEAR):
            return f"there is no rule for {relation!r}"
        if not nouns_of(prompt.meta):
            return "it has no nouns"
        length, most = len(self.tokenizer(caption(nouns_of(prompt.meta))).input_ids), self.model.config.max_text_len
        return f"its nouns are {length} tokens, the model reads {most}" if length > most else None

    def __call__(self, rollout: Rollout) -> RewardOutput:
        height, width = rollout.images.shape[1:3]
        metas = [prompt.meta for prompt in rollout.prompts]
        scores = []
        for first in range(0, len(metas), self.batch_size):
            part = slice(first, first + self.batch_size)
            found = self.detect(rollout.images[part], [nouns_of(meta) for meta in metas[part]])
            scores += [
                detection_score(boxes, meta, (width, height), self.near_pixels, self.compat)
                for boxes, meta in zip(found, metas[part], strict=True)
            ]
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))

    @torch.no_grad()
    def detect(self, images, nouns: list[list[str]]) -> list[Detections]:
        """What is found in each of `images` uint8 `(B, H, W, 3)` for its own nouns."""
        text = self.tokenizer(
            [caption(row) for row in nouns], padding=True, return_offsets_mapping=True, return_tensors="pt"
        )
        offsets = text.pop("offset_mapping")
        pictures = self.pictures(images=list(images), return_tensors="pt").to(self.model.device)
        output = self.model(
            pixel_values=pictures["pixel_values"].to(self.model.dtype),
            pixel_mask=pictures["pixel_mask"],
            **text.to(self.model.device),
        )
        probabilities, boxes = output.logits.float().sigmoid().cpu(), output.pred_boxes.float().cpu()
        if not torch.isfinite(boxes).all() or torch.isnan(probabilities).any():
            raise ValueError("GroundingDINO returned boxes or scores that are not numbers")
        return [
            self._assign(probabilities[row], boxes[row], spans(nouns[row], offsets[row]), nouns[row])
            for row in range(len(nouns))
        ]

    def _assign(self, probabilities, boxes, tokens_of: list[torch.Tensor], nouns: list[str]) -> Detections:
        """Each box to its best noun, best boxes first."""
        scores = torch.stack([probabilities[:, tokens].amax(-1) for tokens in tokens_of], dim=1)
        if self.compat == "released":
            scores[:, [len(noun.split()) > 2 for noun in nouns]] = 0.0
        best, label = scores.max(dim=1)
        order = best.argsort(descending=True, stable=True)
        order = order[best[order] > self.box_threshold]
        return Detections(boxes[order], best[order], label[order])


def caption(nouns: list[str]) -> str:
    """What the model is told to look for."""
    return "".join(f"{noun}. " for noun in nouns).strip()


def spans(nouns: list[str], offsets: torch.Tensor) -> list[torch.Tensor]:
    """For each noun the indices of its tokens in the caption, by character offsets `(L, 2)`."""
    found, start = [], 0
    for noun in nouns:
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= start + len(noun)) & (offsets[:, 1] > offsets[:, 0])
        found.append(inside.nonzero().flatten())
        start += len(noun) + 2
    return found
