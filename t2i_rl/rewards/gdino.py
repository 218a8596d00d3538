"""GroundingDINO as a reward: are the objects there, as many as asked for, where they should be.

This is T2I-R1's detection reward.
"""

import numpy as np
import torch

from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.loading import load_config, load_model, load_part, load_tokenizer
from t2i_rl.core.numbers import Count, Device, Dtype, Positive, Threshold, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.readers import Reader, Reading, ReadsTexts
from t2i_rl.rewards.boxes import (
    COMPATS,
    NEAR,
    SIDES,
    Detections,
    annotated_kind,
    asked_nouns,
    detection_score,
    task_kind,
)


class GroundingDino(Reward, ReadsTexts):
    """`detection_score` of what GroundingDINO (arXiv 2303.05499) finds (T2I-R1 section 3.4).

    It looks for the nouns of the raw prompt. The caption is the nouns with full stops between. A
    box's score for a noun is the greatest sigmoid over the noun's tokens; a box counts for its best
    noun if that score is above `box_threshold`. Released: a score is the mean over the noun's
    tokens, and a box counts for every noun whose score is above the threshold.

    Args:
        path: a checkpoint of transformers' GroundingDinoForObjectDetection.
        compat: `paper`, or `released`: T2I-R1's scorer with its defects (docs/rewards.md).
        near_pixels: how close "near" is.

    Raises:
        UserError: an unknown `compat`; a checkpoint that cannot be loaded, or whose tokenizer does
            not fit it.
    """

    needs_meta = ("nouns",)

    def __init__(
        self,
        path: str,
        compat: str = "paper",
        box_threshold: Threshold = 0.3,
        near_pixels: Positive = 150.0,
        batch_size: Count = 8,
        dtype: Dtype = "float32",
        device: Device | None = "auto",
        revision: str | None = None,
    ):
        from transformers import AutoImageProcessor, GroundingDinoForObjectDetection

        check_arguments(GroundingDino, locals(), "reward")
        if compat not in COMPATS:
            raise UserError(f"reward.compat must be one of {', '.join(COMPATS)}, not {compat!r}")
        self.compat, self.box_threshold, self.near_pixels = compat, box_threshold, near_pixels
        self.batch_size = batch_size
        rows = load_config(path, "grounding-dino", revision).text_config.vocab_size
        self.tokenizer = load_tokenizer(path, revision, rows=rows, begin="cls", end="sep", needs=("pad",))
        self.reader = Reader("GroundingDino", path, [Reading("GroundingDINO", self.tokenizer)])
        self.model = load_model(
            GroundingDinoForObjectDetection, path, kind="grounding-dino", dtype=dtype, device=device, revision=revision
        )
        self.image_processor = load_part(AutoImageProcessor, path, revision)

    def texts_of(self, prompt: Prompt) -> list[str]:
        """The caption that its image is searched for."""
        nouns = asked_nouns(prompt.meta, self.compat)
        return [caption(nouns)] if nouns else []

    def refuses(self, prompt: Prompt) -> str | None:
        """Why a prompt cannot be judged, if it cannot.

        It has nothing to look for, a relation that has no rule, no annotation where its kind needs
        one, or more nouns than the model reads.
        """
        meta, released = prompt.meta, self.compat == "released"
        kind = task_kind(meta) if released else annotated_kind(meta)
        if released and kind in ("spatial", "numeracy") and not meta.get(f"{kind}_info"):
            return f"its task_type is {kind!r} and it has no {kind}_info"
        if kind == "spatial" and (relation := meta["spatial_info"].get("locality")) not in (*SIDES, *NEAR):
            return f"there is no rule for {relation!r}"
        nouns = asked_nouns(meta, self.compat)
        if not nouns:
            return None if released else "it has no nouns"
        length, longest = len(self.tokenizer(caption(nouns)).input_ids), self.model.config.max_text_len
        return f"its nouns are {length} tokens, the model reads {longest}" if length > longest else None

    def __call__(self, drawn: Drawn) -> RewardOutput:
        height, width = drawn.images.shape[1:3]
        metas = [prompt.meta for prompt in drawn.prompts]
        nouns = [asked_nouns(meta, self.compat) for meta in metas]
        rows = [row for row, row_nouns in enumerate(nouns) if row_nouns]
        detections = [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))] * len(metas)
        for first in range(0, len(rows), self.batch_size):
            part = rows[first : first + self.batch_size]
            part_detections = self.detect(drawn.images[part], [nouns[row] for row in part])
            for row, row_detections in zip(part, part_detections, strict=True):
                detections[row] = row_detections
        scores = [
            detection_score(row_detections, meta, (width, height), self.near_pixels, self.compat)
            for row_detections, meta in zip(detections, metas, strict=True)
        ]
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))

    @torch.no_grad()
    def detect(self, images: np.ndarray, nouns: list[list[str]]) -> list[Detections]:
        """What is found in each of `images` uint8 `(B, H, W, 3)` for its own nouns.

        Labels are indices into an image's distinct nouns.

        Raises:
            UserError: boxes or scores are not finite.
        """
        captions = [caption(row) for row in nouns]
        self.reader.check(captions)
        text = self.tokenizer(captions, padding=True, return_offsets_mapping=True, return_tensors="pt")
        offsets = text.pop("offset_mapping")
        inputs = self.image_processor(images=list(images), return_tensors="pt").to(self.model.device)
        output = self.model(
            pixel_values=inputs["pixel_values"].to(self.model.dtype),
            pixel_mask=inputs["pixel_mask"],
            **text.to(self.model.device),
        )
        probabilities, boxes = output.logits.float().sigmoid().cpu(), output.pred_boxes.float().cpu()
        if not torch.isfinite(boxes).all() or torch.isnan(probabilities).any():
            raise UserError(
                "GroundingDINO's boxes or scores are not finite: take reward.dtype=float32 (or bfloat16, not float16)"
            )
        return [
            self._assign(probabilities[row], boxes[row], spans(nouns[row], offsets[row]), nouns[row])
            for row in range(len(nouns))
        ]

    def _assign(
        self, probabilities: torch.Tensor, boxes: torch.Tensor, tokens_of: list[torch.Tensor], nouns: list[str]
    ) -> Detections:
        """Each box to its best noun; released: to every noun above the threshold."""
        if self.compat == "released":
            return self._assign_to_all(probabilities, boxes, tokens_of, nouns)
        scores = torch.stack([probabilities[:, tokens].amax(-1) for tokens in tokens_of], dim=1)
        best, label = scores.max(dim=1)
        order = best.argsort(descending=True, stable=True)
        order = order[best[order] > self.box_threshold]
        return Detections(boxes[order], best[order], label[order])

    def _assign_to_all(
        self, probabilities: torch.Tensor, boxes: torch.Tensor, tokens_of: list[torch.Tensor], nouns: list[str]
    ) -> Detections:
        """One detection for each box and each time a noun is named, best first.

        A noun of three words or more is never found: the released scorer calls it by its first and
        last word.
        """
        distinct = list(dict.fromkeys(nouns))
        short = [number for number, noun in enumerate(nouns) if len(noun.split()) <= 2]
        scores = [probabilities[:, tokens_of[number]].mean(-1) for number in short]
        above = [(score > self.box_threshold).nonzero().flatten() for score in scores]
        best = torch.cat([torch.zeros(0), *(score[rows] for score, rows in zip(scores, above, strict=True))])
        labels = [distinct.index(nouns[number]) for number, rows in zip(short, above, strict=True) for _ in rows]
        order = best.argsort(descending=True, stable=True)
        box_rows = torch.cat([torch.zeros(0, dtype=torch.long), *above])[order]
        return Detections(boxes[box_rows], best[order], torch.tensor(labels, dtype=torch.long)[order])


def caption(nouns: list[str]) -> str:
    """What the model is told to look for."""
    return "".join(f"{noun}. " for noun in nouns).strip()


def spans(nouns: list[str], offsets: torch.Tensor) -> list[torch.Tensor]:
    """For each noun the indices of its tokens in the caption, by character offsets `(L, 2)`."""
    token_indices, start = [], 0
    for noun in nouns:
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= start + len(noun)) & (offsets[:, 1] > offsets[:, 0])
        token_indices.append(inside.nonzero().flatten())
        start += len(noun) + 2
    return token_indices
