"""Texts and images in one conversation with a Janus: written, drawn, looked at, and learnt.

An image is drawn in code embeddings (E_g, after begin-of-image) and looked at through the
understanding tower (E_u). This is the seam: another model's adapter gives, as `interleaved()`, a
module with the same public methods over lists of segments; methods and tasks know no more of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from t2i_rl.core.errors import UserError
from t2i_rl.core.hashing import gathered
from t2i_rl.core.pixels import square
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.engine.decode import DecodedImages, decode_branches, decode_text
from t2i_rl.models.autoregressive.packing import block_mask, pack, places
from t2i_rl.models.autoregressive.segments import Segment, Written
from t2i_rl.models.autoregressive.wording import Piece, Wording

if TYPE_CHECKING:  # which makes one of these over itself
    from t2i_rl.models.autoregressive.janus import Janus

NO_LABEL = -100
Scored = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Laid:
    """One conversation as rows.

    embeds: `(L, D)`. text, image: `(L,)`, what each position has to predict through the language
    head and through the generation head, or NO_LABEL.
    """

    embeds: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor

    def labels(self, kind: str) -> torch.Tensor:
        """`text` or `image` by its name."""
        return {"text": self.text, "image": self.image}[kind]


@dataclass
class Looks:
    """Images by the `id` of their array, each where something asks for it.

    codes: `(N,)`. drawn: embeddings `(N, D)` as it is drawn (E_g). seen: `(N, D)` as it is looked
    at (E_u).
    """

    codes: dict[int, torch.Tensor] = field(default_factory=dict)
    drawn: dict[int, torch.Tensor] = field(default_factory=dict)
    seen: dict[int, torch.Tensor] = field(default_factory=dict)


class InterleavedJanus(nn.Module):
    """Conversations over a `Janus`, whose chat has the cues for reflections and for redrawing.

    `forward` is all that training computes, so that FSDP may shard it; writing and drawing read the
    weights that `prepare` read.
    """

    def __init__(self, janus: "Janus"):
        super().__init__()
        self.janus, self.special, self.wording = janus, janus.special, Wording(janus)
        self.tokens = self.model.config.vision_config.num_image_tokens
        self.side = janus.image_size({"path": janus.path, "revision": janus.revision})
        self._eyes: dict[str, dict[str, torch.Tensor]] | None = None
        self._by_engine = False

    @property
    def adapter(self) -> "Janus":
        return self.janus

    @property
    def model(self) -> nn.Module:
        return self.janus.model

    @property
    def cues(self) -> dict[str, str]:
        """What is asked in front of a reflection and of an image that is drawn again."""
        return self.wording.cues

    def prepare(self) -> None:
        """Read the weights as they are now for writing and drawing.

        Under FSDP this gathers them: every rank calls it.
        """
        self.janus.prepare()
        parts = {"vision_model": self.model.model.vision_model, "aligner": self.model.model.aligner}
        self._eyes = {
            name: {key: gathered(value).clone() for key, value in part.state_dict().items()}
            for name, part in parts.items()
        }

    def done(self) -> None:
        """Between drawing and learning: give memory back, if `model.rollout.keep` is false."""
        self.janus.engine.rollout_done()
        if not self.janus.engine.options.keep:
            self._eyes = None

    def blocks(self) -> list[nn.Module]:
        """See `Janus.blocks`."""
        return self.janus.blocks()

    def unsharded(self) -> set[nn.Parameter]:
        """See `Janus.unsharded`."""
        return self.janus.unsharded()

    def write(
        self,
        contexts: Sequence[Sequence[Segment]],
        role: str,
        seeds: list[int],
        max_tokens: int,
        temperature: float,
    ) -> list[Written]:
        """A text of `role` after each context, at most `max_tokens` long.

        Row `i` depends on `seeds[i]` alone.
        """
        self.janus.reader.check(segment.text for context in contexts for segment in context if segment.role == "prompt")
        embeds, mask = self._left(self._prefixes(contexts, role, max_tokens))
        tokens, token_mask = decode_text(
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
        lengths = token_mask.sum(dim=1).tolist()
        ids = [row[: length - end].tolist() for row, length, end in zip(tokens, lengths, ended, strict=True)]
        return [Written(text.strip(), *facts) for text, *facts in zip(texts, ended, lengths, ids, strict=True)]

    def draw(self, *branches: Any, **settings: Any) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Images uint8 `(B, H, W, 3)` and the codes `(N,)` of each, on the CPU; see `sample`."""
        codes = self.sample(*branches, **settings).tokens
        return self.janus.decode(codes), [row.clone() for row in codes.cpu()]

    def sample(
        self,
        branches: Sequence[Sequence[Sequence[Segment] | None]],
        role: str,
        guidance: Sequence[float],
        seeds: list[int],
        temperature: float,
    ) -> DecodedImages:
        """Image tokens of `role` after each context of the first branch, guided by the others.

        See `rows.guided` for the guidance. A branch of scale 1 changes nothing and is not computed.
        A context that is None is Janus's own unconditional of the first branch's: pads, of its
        length.
        """
        negatives = [(branch, scale) for branch, scale in zip(branches[1:], guidance, strict=True) if scale != 1]
        used_branches = [branches[0], *(branch for branch, _ in negatives)]
        contexts = [context for branch in used_branches for context in branch if context is not None]
        prefixes = iter(self._prefixes(contexts, role, self.tokens))
        rows = [[None if context is None else next(prefixes) for context in branch] for branch in used_branches]
        with torch.no_grad(), self._prepared():
            for branch in rows:
                branch[:] = [self._blank(len(rows[0][i])) if row is None else row for i, row in enumerate(branch)]
        embeds, mask = self._left([row for branch in rows for row in branch])
        return decode_branches(
            self.janus.engine,
            list(zip(embeds.split(len(seeds)), mask.split(len(seeds)), strict=True)),
            seeds,
            count=self.tokens,
            guidance=tuple(float(scale) for _, scale in negatives),
            temperature=temperature,
        )

    def lengths(self, conversations: Sequence[Sequence[Segment]]) -> list[int]:
        """Tokens of each conversation, its images' among them."""
        return [sum(map(self._size, self.wording.pieces(segments))) for segments in conversations]

    @property
    def positions(self) -> int:
        """Tokens that a conversation may have; what an image is closed with predicts nothing."""
        return self.model.config.text_config.max_position_embeddings + 1

    def fits(self, segments: Sequence[Segment]) -> bool:
        """Whether a conversation has no more tokens than the model has positions."""
        return self.lengths([segments])[0] <= self.positions

    def passes(self, conversations: Sequence[Sequence[Segment]], tokens_per_pass: int) -> list[list[list[int]]]:
        """Passes of rows of conversations, by number: see `packing.pack`."""
        return pack(self.lengths(conversations), tokens_per_pass)

    def counts(self, segments: Sequence[Segment], blank: bool = False) -> dict[str, int]:
        """How many labels of each kind a conversation has."""
        learnt_pieces = [piece for piece in self.wording.pieces(segments) if piece.learnt]
        texts = [] if blank else [len(piece.ids) + 1 for piece in learnt_pieces if piece.kind == "words"]
        return {"text": sum(texts), "image": self.tokens * sum(piece.kind == "drawn" for piece in learnt_pieces)}

    def forward(
        self, rows: Sequence[Sequence[Sequence[Segment]]], blank: Sequence[Sequence[bool]] | None = None
    ) -> tuple[dict[str, Scored], torch.Tensor]:
        """Log-probs of every labelled token of rows of conversations.

        Returns `{kind: (log-probs (n,), number of its conversation (n,))}` of texts and images,
        with conversations counted through; and zero, with a gradient for every parameter beside the
        trunk, whatever a pass holds, since ranks add up the gradients of the same parameters.

        Args:
            blank: of which conversations only the image is learnt, after Janus's own unconditional
                in place of what came before.
        """
        blank = blank or [[False] * len(row) for row in rows]
        looks = self.look([segments for row in rows for segments in row])
        laid = [
            [self.lay_out(segments, looks=looks, blank=is_blank) for segments, is_blank in zip(row, flags, strict=True)]
            for row, flags in zip(rows, blank, strict=True)
        ]
        owner, position = places([[len(conversation.embeds) for conversation in row] for row in laid])
        owner, position = owner.to(self.janus.device), position.to(self.janus.device)
        row_embeds = [torch.cat([conversation.embeds for conversation in row]) for row in laid]
        hidden = self.hidden(pad_sequence(row_embeds, batch_first=True), owner, position)
        first_number = torch.tensor([0, *accumulate(map(len, rows))][:-1], device=owner.device)  # of each row
        heads, scored = {"text": self.model.lm_head, "image": self.model.model.generation_head}, {}
        for kind, head in heads.items():
            labels = [torch.cat([conversation.labels(kind) for conversation in row]) for row in laid]
            labels = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)
            labelled = labels != NO_LABEL
            logprobs = -F.cross_entropy(head(hidden[labelled]).float(), labels[labelled], reduction="none")
            scored[kind] = logprobs, (owner + first_number[:, None])[labelled]
        return scored, self._zero_with_gradients()

    def _zero_with_gradients(self) -> torch.Tensor:
        """Zero that depends on every parameter which learns and is no part of the trunk."""
        named = self.model.named_parameters()
        learnt = [(name, value) for name, value in named if value.requires_grad]
        beside_trunk = [value for name, value in learnt if not name.startswith("model.language_model.layers")]
        return sum(0 * value.float().sum() for value in beside_trunk)

    def hidden(self, embeds: torch.Tensor, owner: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The trunk's states `(R, L, D)` of rows of conversations, see `packing.places`."""
        trunk, mask = self.model.model.language_model, block_mask(owner)
        output = trunk(inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False)
        return output.last_hidden_state

    def lay_out(
        self,
        segments: Sequence[Segment],
        opening: str | None = None,
        looks: Looks | None = None,
        blank: bool = False,
    ) -> Laid:
        """A conversation as embeddings and labels; see `Wording.pieces` and `forward`."""
        looks = looks or self.look([segments])
        rows, text, image = [], [], []
        for piece in self.wording.pieces(segments, opening):
            embeds, kind, labels = self._embedded(piece, looks)
            rows.append(embeds)
            for name, column in (("text", text), ("image", image)):
                column.append(torch.full((len(embeds),), NO_LABEL, device=embeds.device))
                if piece.learnt and name == kind:  # a position predicts the next: labels begin a piece before
                    column[-2][-1] = labels[0]
                    column[-1][: len(labels) - 1] = labels[1:]
        laid = Laid(torch.cat(rows), torch.cat(text), torch.cat(image))
        return self._blanked(laid) if blank else laid

    def _embedded(self, piece: Piece, looks: Looks) -> tuple[torch.Tensor, str, torch.Tensor | None]:
        """Embeddings `(L, D)` of a piece, and the kind of its labels with the labels."""
        if piece.kind == "words":
            labels = torch.tensor([*piece.ids, self.special["eos"]], device=self.janus.device)
            return self._words(piece.ids), "text", labels
        if piece.kind == "seen":
            return looks.seen[id(piece.image)], "image", None
        if piece.codes is None:
            return looks.drawn[id(piece.image)], "image", looks.codes[id(piece.image)]
        codes = piece.codes.to(self.janus.device)
        return self._code_embeds(codes), "image", codes

    def _size(self, piece: Piece) -> int:
        return len(piece.ids) if piece.kind == "words" else self.tokens

    def _blanked(self, laid: Laid) -> Laid:
        """The same, with nothing learnt but the last image after an unconditional."""
        first = int((laid.image != NO_LABEL).nonzero()[-self.tokens])  # begin-of-image, which predicts the first code
        text, image = torch.full_like(laid.text, NO_LABEL), laid.image.clone()
        image[:first] = NO_LABEL
        return Laid(torch.cat([self._blank(first + 1), laid.embeds[first + 1 :]]), text, image)

    def _blank(self, length: int) -> torch.Tensor:
        """Janus's own unconditional `(length, D)`."""
        return self._words([self.special["bos"], *[self.special["pad"]] * (length - 2), self.special["boi"]])

    def _prefixes(self, contexts: Sequence[Sequence[Segment]], role: str, new_tokens: int) -> list[torch.Tensor]:
        """Embeddings `(L_i, D)` of conversations up to where a segment of `role` begins.

        They are by the weights that `prepare` read.

        Raises:
            UserError: with `new_tokens` to come they are longer than the model's positions.
        """
        with torch.no_grad(), self._prepared():
            looks = self.look(contexts)
            prefixes = [self.lay_out(segments, opening=role, looks=looks).embeds for segments in contexts]
        longest, room = max(map(len, prefixes)) + new_tokens, self.model.config.text_config.max_position_embeddings
        if longest > room:
            raise UserError(
                f"a conversation of {longest} tokens, and the model has {room} positions: shorten the prompt, set "
                "method.interleave.policy=window, or lower method.interleave.rounds or max_tokens"
            )
        return prefixes

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Inside, embeddings are by the weights that `prepare` read, and not by the model's own."""
        if self._eyes is None:
            raise RuntimeError("prepare() reads the weights that writing and drawing take; it was not called")
        self._by_engine = True
        try:
            yield
        finally:
            self._by_engine = False

    def look(self, conversations: Sequence[Sequence[Segment]]) -> Looks:
        """Each image once, and only through the encoders that a conversation asks for."""
        pieces = [piece for segments in conversations for piece in self.wording.pieces(segments)]
        drawn = {id(piece.image): piece.image for piece in pieces if piece.kind == "drawn" and piece.codes is None}
        seen = {id(piece.image): piece.image for piece in pieces if piece.kind == "seen"}
        looks = Looks()
        if drawn:
            pixels = torch.cat([self.pixels(image) for image in drawn.values()])
            with torch.no_grad():
                codes = nearest_codes(self.model.model.vqmodel, pixels)
            looks.codes = dict(zip(drawn, codes, strict=True))
            looks.drawn = dict(zip(drawn, self._code_embeds(codes), strict=True))
        if seen:
            embeds = self._see(torch.cat([self.pixels(image) for image in seen.values()]))
            looks.seen = dict(zip(seen, embeds.to(self._words([self.special["bos"]])), strict=True))
        return looks

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        """E_u `(B, N, D)`."""
        model = self.model.model
        if not self._by_engine:
            return model.get_image_features(pixels, return_dict=True).pooler_output
        states = functional_call(model.vision_model, self._eyes["vision_model"], (pixels,), {"return_dict": True})
        return functional_call(model.aligner, self._eyes["aligner"], (states.last_hidden_state,))

    def _code_embeds(self, codes: torch.Tensor) -> torch.Tensor:
        """E_g `(..., N, D)`."""
        if self._by_engine:
            return self.janus.engine.weights.image_embed[codes]
        return self.model.prepare_embeddings_for_image_generation(codes)

    def _words(self, ids: list[int]) -> torch.Tensor:
        """Embeddings `(L, D)` of words."""
        ids = torch.tensor(ids, dtype=torch.long, device=self.janus.device)
        return self.janus.engine.weights.text_embed[ids] if self._by_engine else self.model.get_input_embeddings()(ids)

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        """An image uint8 as `(1, 3, S, S)` in [-1, 1] in the model's dtype.

        Of one of another size the shorter side is resized (bicubic), and the middle is cut out.
        """
        if image.shape[:2] != (self.side, self.side):
            image = square(Image.fromarray(image), self.side)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self.janus.device)
        return (pixels.float() / 127.5 - 1).to(self.model.dtype)

    @staticmethod
    def _left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `(L_i, D)` padded on the left to `(B, L, D)`, and their mask."""
        width = max(map(len, rows))
        embeds = torch.stack([F.pad(row, (0, 0, width - len(row), 0)) for row in rows])
        mask = torch.stack([torch.arange(width, device=embeds.device) >= width - len(row) for row in rows])
        return embeds, mask
