"""Texts and pictures in one conversation with a Janus: written, drawn, looked at, and learnt (specification section 3.5).

A picture is drawn in code embeddings (E_g, after begin-of-image) and looked at through the understanding tower (E_u). This is the seam: another model's adapter
gives, as `interleaved()`, a module with the same public methods over lists of segments; methods and tasks know no more of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

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
from t2i_rl.core.tokenizing import ids_of
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.engine.decode import DecodedImages, decode_branches, decode_text
from t2i_rl.models.autoregressive.packing import block_mask, pack, places
from t2i_rl.models.autoregressive.segments import GENERATION, UNDERSTANDING, Segment, Written

if TYPE_CHECKING:  # which makes one of these over itself
    from t2i_rl.models.autoregressive.janus import Janus

NO_LABEL = -100
Scored = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Laid:
    """One conversation as rows: `embeds` `(L, D)`, and at each place what it has to predict, `text` `(L,)` through the language head, `image` `(L,)` through
    the generation head, or NO_LABEL."""

    embeds: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor


@dataclass
class Piece:
    """Words `ids`, or a picture as it is `drawn` or `seen`; `learnt`: they, and a text's end, are predicted from the place before them on."""

    kind: str
    ids: list[int] = field(default_factory=list)
    image: np.ndarray | None = None
    codes: torch.Tensor | None = None
    learnt: bool = False


@dataclass
class Looks:
    """Pictures by the `id` of their array: codes `(N,)`, and `(N, D)` as they are drawn (E_g) and as they are seen (E_u), each where something asks for it."""

    codes: dict[int, torch.Tensor]
    drawn: dict[int, torch.Tensor]
    seen: dict[int, torch.Tensor]


class InterleavedJanus(nn.Module):
    """Over a `Janus`, whose chat has the cues that are asked in front of a reflection and of a picture drawn again.

    `forward` is all that training computes, so that FSDP may shard it; writing and drawing read the weights that `prepare` read.
    """

    def __init__(self, janus: "Janus"):
        super().__init__()
        self.janus, self.special = janus, janus.special
        self.cues = {"reflect": janus.chat.reflect, "redraw": janus.chat.redraw}
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

    def prepare(self) -> None:
        """Read the weights as they are now for writing and drawing. Under FSDP this gathers them: every rank calls it."""
        self.janus.prepare()
        parts = {name: getattr(self.model.model, name) for name in ("vision_model", "aligner")}
        self._eyes = {name: {key: gathered(value).clone() for key, value in part.state_dict().items()} for name, part in parts.items()}  # fmt: skip

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

    def write(self, contexts: Sequence[Sequence[Segment]], role: str, seeds: list[int], max_tokens: int, temperature: float) -> list[Written]:  # fmt: skip
        """A text of `role` after each context, at most `max_tokens` long; row `i` depends on `seeds[i]` alone."""
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
        return [Written(text.strip(), *rest) for text, *rest in zip(texts, ended, lengths, ids, strict=True)]

    def draw(self, *given, **settings) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Pictures uint8 `(B, H, W, 3)` and the codes `(N,)` of each, on the CPU; see `sample`."""
        codes = self.sample(*given, **settings).tokens
        return self.janus.decode(codes), [row.clone() for row in codes.cpu()]

    def sample(self, branches: Sequence[Sequence[Sequence[Segment] | None]], role: str, guidance: Sequence[float], seeds: list[int], temperature: float) -> DecodedImages:  # fmt: skip
        """Image tokens of `role` after each context of the first branch, guided by the other branches (see `rows.guided`).

        A branch of scale 1 changes nothing and is not computed. A context that is None is Janus's own unconditional of the first branch's: pads, of its length.
        """
        used = [(branch, scale) for branch, scale in zip(branches[1:], guidance, strict=True) if scale != 1]
        kept = [branches[0], *(branch for branch, _ in used)]
        given = [context for branch in kept for context in branch if context is not None]
        laid = iter(self._prefixes(given, role, self.tokens))
        rows = [[None if context is None else next(laid) for context in branch] for branch in kept]
        with torch.no_grad(), self._prepared():
            filled = [self._blank(len(rows[0][i])) if row is None else row for branch in rows for i, row in enumerate(branch)]  # fmt: skip
        embeds, mask = self._left(filled)
        parts = list(zip(embeds.split(len(seeds)), mask.split(len(seeds)), strict=True))
        scales = tuple(float(scale) for _, scale in used)
        return decode_branches(self.janus.engine, parts, seeds, count=self.tokens, guidance=scales, temperature=temperature)  # fmt: skip

    def lengths(self, conversations: Sequence[Sequence[Segment]]) -> list[int]:
        """Tokens of each conversation, its pictures' among them."""
        return [sum(map(self._size, self._pieces(segments))) for segments in conversations]

    @property
    def positions(self) -> int:
        """Tokens that a conversation may have: what a picture is closed with has no successor and needs none."""
        return self.model.config.text_config.max_position_embeddings + 1

    def fits(self, segments: Sequence[Segment]) -> bool:
        """Whether a conversation has no more tokens than the model has positions."""
        return self.lengths([segments])[0] <= self.positions

    def passes(self, conversations: Sequence[Sequence[Segment]], tokens_per_pass: int) -> list[list[list[int]]]:
        """Passes of rows of conversations, by number: see `packing.pack`."""
        return pack(self.lengths(conversations), tokens_per_pass)

    def counts(self, segments: Sequence[Segment], blank: bool = False) -> dict[str, int]:
        """How many labels of each kind a conversation has."""
        learnt = [piece for piece in self._pieces(segments) if piece.learnt]
        texts = [] if blank else [len(piece.ids) + 1 for piece in learnt if piece.kind == "words"]
        return {"text": sum(texts), "image": self.tokens * sum(piece.kind == "drawn" for piece in learnt)}

    def forward(self, rows: Sequence[Sequence[Sequence[Segment]]], blank: Sequence[Sequence[bool]] | None = None) -> tuple[dict[str, Scored], torch.Tensor]:  # fmt: skip
        """Every labelled token of texts and images, `{kind: (log-probs (n,), its conversation's number (n,))}`, of rows of conversations counted through; and zero, with
        a gradient for every parameter beside the trunk, whatever a pass holds: ranks add up the gradients of the same parameters.

        Where `blank`, only the picture is learnt, after Janus's own unconditional in place of what came before.
        """
        blank = blank or [[False] * len(row) for row in rows]
        looks = self._look([segments for row in rows for segments in row])
        laid = [[self.lay_out(each, looks=looks, blank=empty) for each, empty in zip(row, empties, strict=True)] for row, empties in zip(rows, blank, strict=True)]  # fmt: skip
        owner, position = (table.to(self.janus.device) for table in places([[len(each.embeds) for each in row] for row in laid]))  # fmt: skip
        embeds = pad_sequence([torch.cat([each.embeds for each in row]) for row in laid], batch_first=True)
        hidden = self.hidden(embeds, owner, position)
        before = torch.tensor([0, *accumulate(map(len, rows))][:-1], device=owner.device)
        heads, found = {"text": self.model.lm_head, "image": self.model.model.generation_head}, {}
        for kind, head in heads.items():
            labels = [torch.cat([getattr(each, kind) for each in row]) for row in laid]
            labels = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)
            chosen = labels != NO_LABEL
            logprobs = -F.cross_entropy(head(hidden[chosen]).float(), labels[chosen], reduction="none")
            found[kind] = logprobs, (owner + before[:, None])[chosen]
        return found, self._nothing()

    def _nothing(self) -> torch.Tensor:
        named = self.model.named_parameters()
        return sum(0 * value.float().sum() for name, value in named if value.requires_grad and not name.startswith("model.language_model.layers"))  # fmt: skip

    def hidden(self, embeds: torch.Tensor, owner: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The trunk's states `(R, L, D)` of rows of conversations, laid out as `packing.places` says."""
        trunk = self.model.model.language_model
        return trunk(inputs_embeds=embeds, attention_mask=block_mask(owner), position_ids=position, use_cache=False).last_hidden_state  # fmt: skip

    def lay_out(self, segments: Sequence[Segment], opening: str | None = None, looks: Looks | None = None, blank: bool = False) -> Laid:  # fmt: skip
        """A conversation as embeddings and labels; with `opening`, up to where a segment of that role begins."""
        looks = looks or self._look([segments])
        rows, text, image = [], [], []
        for piece in self._pieces(segments, opening):
            embeds, kind, labels = self._embedded(piece, looks)
            rows.append(embeds)
            for name, column in (("text", text), ("image", image)):
                column.append(torch.full((len(embeds),), NO_LABEL, device=embeds.device))
                if piece.learnt and name == kind:
                    column[-2][-1] = labels[0]
                    column[-1][: len(labels) - 1] = labels[1:]
        laid = Laid(torch.cat(rows), torch.cat(text), torch.cat(image))
        return self._blanked(laid) if blank else laid

    def _pieces(self, segments: Sequence[Segment], opening: str | None = None) -> list[Piece]:
        pieces = []
        if not segments or segments[0].role not in ("system", "prompt"):
            pieces.append(Piece("words", [self.special["bos"]]))
        asked = any(segment.role == "question" for segment in segments)  # then that alone is asked
        for segment in segments:
            if segment.role == "system":
                continue  # stands in the prompt's wording
            if not asked:
                pieces += self._cue(segment.role)
            if segment.kind == "text":
                pieces.append(Piece("words", self._ids(segment, segments), learnt=segment.loss))
                continue
            begin, end = (Piece("words", [self.special[name]]) for name in ("boi", "eoi"))
            if segment.loss or GENERATION in segment.seen_by:
                codes = segment.drawn_as if segment.loss else None  # what follows has seen the picture, not its codes
                pieces += [begin, Piece("drawn", image=segment.image, codes=codes, learnt=segment.loss), end]
            if UNDERSTANDING in segment.seen_by:
                pieces += [begin, Piece("seen", image=segment.image), end]
        if opening is not None:
            pieces += self._cue(opening)
        if opening in ("draw", "redraw"):
            pieces.append(Piece("words", [self.special["boi"]]))
        return [piece for piece in pieces if piece.ids or piece.image is not None or piece.learnt]

    def _embedded(self, piece: Piece, looks: Looks) -> tuple[torch.Tensor, str, torch.Tensor | None]:
        """Embeddings `(L, D)` of a piece, and what is predicted where it is learnt: the kind of label, and the labels."""
        if piece.kind == "words":
            return self._words(piece.ids), "text", torch.tensor([*piece.ids, self.special["eos"]], device=self.janus.device)  # fmt: skip
        if piece.kind == "seen":
            return looks.seen[id(piece.image)], "image", None
        if piece.codes is None:
            return looks.drawn[id(piece.image)], "image", looks.codes[id(piece.image)]
        codes = piece.codes.to(self.janus.device)
        return self._code_embeds(codes), "image", codes

    def _size(self, piece: Piece) -> int:
        return len(piece.ids) if piece.kind == "words" else self.tokens

    def _cue(self, role: str) -> list[Piece]:
        cue = self.cues.get(role)
        return [Piece("words", self._tokens(f"\n\n<|User|>: {cue}\n\n<|Assistant|>:"))] if cue else []

    def _blanked(self, laid: Laid) -> Laid:
        """The same with Janus's own unconditional in front of the last picture that is learnt, and nothing else learnt."""
        first = int((laid.image != NO_LABEL).nonzero()[-self.tokens])  # begin-of-image, which predicts the first code
        text, image = torch.full_like(laid.text, NO_LABEL), laid.image.clone()
        image[:first] = NO_LABEL
        return Laid(torch.cat([self._blank(first + 1), laid.embeds[first + 1 :]]), text, image)

    def _blank(self, length: int) -> torch.Tensor:
        return self._words([self.special["bos"], *[self.special["pad"]] * (length - 2), self.special["boi"]])

    def _prefixes(self, contexts: Sequence[Sequence[Segment]], role: str, more: int) -> list[torch.Tensor]:
        """Embeddings `(L_i, D)` of conversations up to where a segment of `role` begins, by the weights that `prepare` read.

        Raises:
            UserError: with `more` tokens to come they are longer than the model's positions.
        """
        with torch.no_grad(), self._prepared():
            looks = self._look(contexts)
            laid = [self.lay_out(segments, opening=role, looks=looks).embeds for segments in contexts]
        longest, room = max(map(len, laid)) + more, self.model.config.text_config.max_position_embeddings
        if longest > room:
            raise UserError(
                f"a conversation of {longest} tokens, and the model has {room} positions: shorten the prompt, set method.interleave.policy=window, or lower method.interleave.rounds or max_tokens"
            )
        return laid

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        if self._eyes is None:
            raise RuntimeError("prepare() reads the weights that writing and drawing take; it was not called")
        self._by_engine = True
        try:
            yield
        finally:
            self._by_engine = False

    def _look(self, conversations: Sequence[Sequence[Segment]]) -> Looks:
        """Each picture once, all together, and only through the encoders that some conversation asks for."""
        pieces = [piece for segments in conversations for piece in self._pieces(segments)]
        coded, watched = ({id(piece.image): piece.image for piece in pieces if piece.kind == kind and piece.codes is None} for kind in ("drawn", "seen"))  # fmt: skip
        looks = Looks({}, {}, {})
        if coded:
            with torch.no_grad():
                codes = nearest_codes(self.model.model.vqmodel, torch.cat([self.pixels(image) for image in coded.values()]))  # fmt: skip
            looks.codes = dict(zip(coded, codes, strict=True))
            looks.drawn = dict(zip(coded, self._code_embeds(codes), strict=True))
        if watched:
            seen = self._see(torch.cat([self.pixels(image) for image in watched.values()]))
            looks.seen = dict(zip(watched, seen.to(self._words([self.special["bos"]])), strict=True))
        return looks

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        """E_u `(B, N, D)`."""
        model = self.model.model
        if not self._by_engine:
            return model.get_image_features(pixels, return_dict=True).pooler_output
        eyes = functional_call(model.vision_model, self._eyes["vision_model"], (pixels,), {"return_dict": True})
        return functional_call(model.aligner, self._eyes["aligner"], (eyes.last_hidden_state,))

    def _code_embeds(self, codes: torch.Tensor) -> torch.Tensor:
        """E_g `(..., N, D)`."""
        if self._by_engine:
            return self.janus.engine.weights.image_embed[codes]
        return self.model.prepare_embeddings_for_image_generation(codes)

    def _ids(self, segment: Segment, segments: Sequence[Segment]) -> list[int]:
        """The tokens of a text in its wording; of one that was written, those that it was written in."""
        if segment.drawn_as is not None:
            return segment.drawn_as
        if segment.role == "prompt":
            system = next((other.text for other in segments if other.role == "system"), None)
            chat = self.janus.chat if system is None else Chat(self.janus.as_text(system), "{prompt}")
            return self.janus.ids_of(chat.plan(self.janus.as_text(segment.text)))
        text = self.janus.as_text(segment.text)
        return self._tokens(f"\n\n<|User|>: {text}\n\n<|Assistant|>:" if segment.role == "question" else text)

    def _tokens(self, text: str) -> list[int]:
        return ids_of(self.janus.tokenizer, text)

    def _words(self, ids: list[int]) -> torch.Tensor:
        ids = torch.tensor(ids, dtype=torch.long, device=self.janus.device)
        return self.janus.engine.weights.text_embed[ids] if self._by_engine else self.model.get_input_embeddings()(ids)

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        """A picture uint8 as `(1, 3, S, S)` in [-1, 1] in the model's dtype; of another size, its shorter side is resized (bicubic) and its middle cut out."""
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
