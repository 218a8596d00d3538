"""Texts and pictures in one conversation with a Janus: written, drawn, looked at, and learnt (specification section 3.5).

A picture is drawn in code embeddings (E_g, after begin-of-image) and looked at through the understanding tower (E_u). This is the seam: whatever else is to
run IRG gives `write`, `draw` and `losses` over lists of segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from t2i_rl.errors import UserError
from t2i_rl.irg.trajectory import GENERATION, UNDERSTANDING, Segment
from t2i_rl.models.janus import Chat, Janus
from t2i_rl.pretrain.vq import nearest_codes
from t2i_rl.rollout.decode import DecodedImages, decode_branches, decode_text
from t2i_rl.rollout.rows import positions

NO_LABEL = -100


@dataclass
class Laid:
    """One conversation as rows: `embeds` `(L, D)`, and at each place what it has to predict, `text` `(L,)` through the language head, `image` `(L,)` through
    the generation head, or NO_LABEL."""

    embeds: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor


class InterleavedJanus:
    """Over a `Janus`; `cues` are asked in front of a reflection and of a picture drawn again."""

    def __init__(self, janus: Janus, reflect_cue: str = "", redraw_cue: str = ""):
        self.janus, self.model, self.special = janus, janus.model, janus.special
        self.cues = {"reflect": reflect_cue, "redraw": redraw_cue}
        self.tokens = self.model.config.vision_config.num_image_tokens
        self.side = janus.image_size({"path": janus.path, "revision": janus.revision})

    def write(self, contexts: Sequence[Sequence[Segment]], role: str, seeds: list[int], max_tokens: int, temperature: float) -> list[tuple[str, bool]]:  # fmt: skip
        """A text of `role` after each context, and whether EOS ended it before `max_tokens`; row `i` depends on `seeds[i]` alone."""
        embeds, mask = self._left([self.lay_out(context, opening=role).embeds for context in contexts])
        tokens, _ = decode_text(
            self.janus.engine,
            mask.long(),
            mask,
            seeds,
            max_tokens=max_tokens,
            eos=self.special["eos"],
            temperature=temperature,
            embeds=embeds,
        )
        texts = self.janus.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ended = (tokens == self.special["eos"]).any(dim=1).tolist()
        return [(text.strip(), end) for text, end in zip(texts, ended, strict=True)]

    def draw(self, *given, **settings) -> np.ndarray:
        """Pictures uint8 `(B, H, W, 3)`; see `sample`."""
        return self.janus.decode(self.sample(*given, **settings).tokens)

    def sample(self, branches: Sequence[Sequence[Sequence[Segment]]], role: str, guidance: Sequence[float], seeds: list[int], temperature: float) -> DecodedImages:  # fmt: skip
        """Image tokens of `role` after each context of the first branch, guided by the other branches (see `rows.guided`).

        A branch of scale 1 changes nothing and is not computed. A context that is None is Janus's own unconditional of the first branch's: pads, of its length.
        """
        used = [(branch, scale) for branch, scale in zip(branches[1:], guidance, strict=True) if scale != 1]
        kept = [branches[0], *(branch for branch, _ in used)]
        laid = [self.lay_out(context, opening=role).embeds for context in kept[0]]
        for branch in kept[1:]:
            laid += [
                self._blank(len(laid[row])) if context is None else self.lay_out(context, opening=role).embeds
                for row, context in enumerate(branch)
            ]
        embeds, mask = self._left(laid)
        count = len(branches[0])
        parts = list(zip(embeds.split(count), mask.split(count), strict=True))
        scales = tuple(float(scale) for _, scale in used)
        return decode_branches(self.janus.engine, parts, seeds, count=self.tokens, guidance=scales, temperature=temperature)  # fmt: skip

    def losses(self, conversations: Sequence[Sequence[Segment]]) -> dict[str, tuple[torch.Tensor, int]]:
        """`{kind: (sum of cross-entropies over labelled tokens, their count)}` of texts and images, with gradients."""
        laid = [self.lay_out(segments) for segments in conversations]
        width = max(len(each.embeds) for each in laid)
        embeds = torch.stack([F.pad(each.embeds, (0, 0, 0, width - len(each.embeds))) for each in laid])
        mask = torch.stack([torch.arange(width, device=embeds.device) < len(each.embeds) for each in laid])
        hidden = self.hidden(embeds, mask)
        heads = {"text": self.model.lm_head, "image": self.model.model.generation_head}
        found = {}
        for kind, head in heads.items():
            labels = torch.stack([F.pad(getattr(each, kind), (0, width - len(each.embeds)), value=NO_LABEL) for each in laid])  # fmt: skip
            chosen = labels != NO_LABEL
            total = F.cross_entropy(head(hidden[chosen]).float(), labels[chosen], reduction="sum") if chosen.any() else hidden.sum() * 0  # fmt: skip
            found[kind] = (total, int(chosen.sum()))
        return found

    def hidden(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The trunk's states `(B, L, D)` of padded rows."""
        trunk = self.model.model.language_model
        return trunk(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False).last_hidden_state  # fmt: skip

    def lay_out(self, segments: Sequence[Segment], opening: str | None = None) -> Laid:
        """A conversation as embeddings and labels; with `opening`, up to where a segment of that role begins."""
        rows, text, image = [], [], []

        def put(embeds: torch.Tensor, labels: dict | None = None) -> None:
            """Add places; `labels` `{kind: ids}` are predicted from the place before the first of them on."""
            rows.append(embeds)
            for kind, column in (("text", text), ("image", image)):
                column.append(torch.full((len(embeds),), NO_LABEL, device=embeds.device))
                if labels and kind in labels:
                    column[-2][-1] = labels[kind][0]
                    column[-1][: len(labels[kind]) - 1] = labels[kind][1:]

        if not segments or segments[0].role not in ("system", "prompt"):
            put(self._words([self.special["bos"]]))
        for segment in segments:
            if segment.role == "system":
                continue  # stands in the prompt's wording
            self._put_cue(segment.role, put)
            if segment.kind == "image":
                self._put_image(segment, put)
                continue
            ids = self._ids(segment, segments)
            put(self._words(ids), {"text": torch.tensor([*ids, self.special["eos"]], device=self.janus.device)} if segment.loss else None)  # fmt: skip
        if opening is not None:
            self._put_cue(opening, put)
        if opening in ("draw", "redraw"):
            put(self._words([self.special["boi"]]))
        return Laid(torch.cat(rows), torch.cat(text), torch.cat(image))

    def _put_cue(self, role: str, put) -> None:
        if self.cues.get(role):
            put(self._words(self._tokens(f"\n\n<|User|>: {self.cues[role]}\n\n<|Assistant|>:")))

    def _put_image(self, segment: Segment, put) -> None:
        pixels = self.pixels(segment.image)
        around = [self._words([self.special[name]]) for name in ("boi", "eoi")]
        if segment.loss or GENERATION in segment.seen_by:
            with torch.no_grad():
                codes = nearest_codes(self.model.model.vqmodel, pixels)
            put(around[0])
            drawn = self.model.prepare_embeddings_for_image_generation(codes)[0]
            put(drawn.to(around[0]), {"image": codes[0]} if segment.loss else None)
            put(around[1])
        if UNDERSTANDING in segment.seen_by:
            seen = self.model.model.get_image_features(pixels).pooler_output.reshape(-1, around[0].shape[-1])
            put(torch.cat([around[0], seen.to(around[0]), around[1]]))

    def _ids(self, segment: Segment, segments: Sequence[Segment]) -> list[int]:
        """The tokens of a text in its wording."""
        if segment.role == "prompt":
            system = next((other.text for other in segments if other.role == "system"), None)
            chat = self.janus.chat if system is None else Chat(system, "{prompt}")
            return self.janus.tokenizer(chat.plan(segment.text)).input_ids
        if segment.role == "question":
            return self._tokens(f"\n\n<|User|>: {segment.text}\n\n<|Assistant|>:")
        return self._tokens(segment.text)

    def _tokens(self, text: str) -> list[int]:
        return self.janus.tokenizer(text, add_special_tokens=False).input_ids

    def _blank(self, length: int) -> torch.Tensor:
        return self._words([self.special["bos"], *[self.special["pad"]] * (length - 2), self.special["boi"]])

    def _words(self, ids: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor(ids, device=self.janus.device))

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        """A picture uint8 as `(1, 3, S, S)` in [-1, 1] in the model's dtype; another size is resized (bicubic).

        Raises:
            UserError: it is no square.
        """
        if image.shape[0] != image.shape[1]:
            raise UserError(f"a picture of {image.shape[1]}x{image.shape[0]} pixels: Janus draws and sees squares")
        if image.shape[0] != self.side:
            image = np.asarray(Image.fromarray(image).resize((self.side, self.side), Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self.janus.device)
        return (pixels.float() / 127.5 - 1).to(self.model.dtype)

    @staticmethod
    def _left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `(L_i, D)` padded on the left to `(B, L, D)`, and their mask."""
        width = max(map(len, rows))
        embeds = torch.stack([F.pad(row, (0, 0, width - len(row), 0)) for row in rows])
        mask = torch.stack([torch.arange(width, device=embeds.device) >= width - len(row) for row in rows])
        return embeds, mask
