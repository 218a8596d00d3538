"""IRG's conversations on a Janus: labels where the modes have them, caches that equal the full
forward, branches that guide as written."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.methods.irg.rounds import Rounds, windowed, without_images, without_reflection
from t2i_rl.methods.irg.trajectory import MODES
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.engine.decode import decode_image
from t2i_rl.models.autoregressive.engine.rows import guided
from t2i_rl.models.autoregressive.interleaved import NO_LABEL, InterleavedJanus
from t2i_rl.models.autoregressive.segments import BOTH, Segment
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.render import render
from t2i_rl.shapes.text import plan
from tests.support.tiny import load_tiny_janus, save_tiny_janus

RNG = np.random.default_rng(0)
EXAMPLES = [sample_example(RNG) for _ in range(4)]


@pytest.fixture(scope="module")
def inter(tmp_path_factory) -> InterleavedJanus:
    janus = load_tiny_janus(save_tiny_janus(tmp_path_factory.mktemp("janus")))
    inter = InterleavedJanus(janus)
    inter.prepare()
    return inter


def conversation(mode: str, number: int = 0) -> list[Segment]:
    """A sample of a mode from the world; every text in its words."""
    (prompt, scene), (_, other) = EXAMPLES[number], EXAMPLES[(number + 1) % len(EXAMPLES)]
    texts = {
        "prompt": prompt.text,
        "think": plan(other),
        "question": "describe the picture.",
        "reflect": f"draw. {plan(scene)}",
    }
    images = {"draw": render(other), "redraw": render(scene)}
    return [
        Segment(part.role, text=texts[part.role], loss=part.loss)
        if part.kind == "text"
        else Segment(part.role, image=images[part.role], loss=part.loss, seen_by=frozenset() if part.loss else BOTH)
        for part in MODES[mode]
    ]


def plain_hidden(inter: InterleavedJanus, embeds: torch.Tensor) -> torch.Tensor:
    """States `(L, D)` of one conversation by transformers' own causal forward, no mask given."""
    return inter.model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]


def losses(inter: InterleavedJanus, conversations: list[list[Segment]]) -> dict[str, tuple[float, int]]:
    """Sums and counts, a row a conversation."""
    scored, counts = (
        inter([[segments] for segments in conversations])[0],
        [inter.counts(segments) for segments in conversations],
    )
    for kind, (_, owner) in scored.items():
        assert [int((owner == i).sum()) for i in range(len(counts))] == [segments[kind] for segments in counts]
    return {kind: (-logprobs.sum().item(), len(logprobs)) for kind, (logprobs, _) in scored.items()}


def full_logits(inter: InterleavedJanus, segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the labelled places of the last picture `(N, codes)` by one plain forward, and its
    codes `(N,)`."""
    laid = inter.lay_out(segments)
    hidden = plain_hidden(inter, laid.embeds)
    chosen = laid.image != NO_LABEL
    return inter.model.model.generation_head(hidden[chosen]), laid.image[chosen]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_is_asked_stands_once_in_front_of_its_answer(inter, mode, monkeypatch):
    """Inference asks by cues; the understanding modes have a question, and nothing else then."""
    monkeypatch.setattr(inter.wording, "cues", {"reflect": "two circle", "redraw": "draw"})
    asked = {role: inter.wording.cue(role)[0].ids for role in ("reflect", "redraw")}
    asked["question"] = inter.wording.ids_of("\n\n<|User|>: describe the picture.\n\n<|Assistant|>:")

    def kind(piece) -> str:
        return next((role for role, ids in asked.items() if piece.ids == ids), piece.kind)

    kinds = [kind(piece) for piece in inter.wording.pieces(conversation(mode))]
    picture = ["words", "drawn", "words"]
    both = [*picture, "words", "seen", "words"]
    assert (
        kinds
        == {
            "initial_thinking_understanding_learning": ["words", *both, "question", "words"],
            "initial_thinking_generation_learning": ["words", "words"],
            "initial_full_learning": ["words", "words", *picture],
            "improving_thinking_understanding_learning": ["words", *both, *both, "question", "words"],
            "improving_thinking_generation_learning": ["words", "words", *both, "reflect", "words"],
            "improving_full_learning": ["words", "words", *both, "reflect", "words", "redraw", *picture],
        }[mode]
    )


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_labels_of_a_mode_are_its_learnt_segments_and_no_others(inter, mode):
    segments = conversation(mode)
    laid = inter.lay_out(segments)
    texts = [segment.text for segment in segments if segment.kind == "text" and segment.loss]
    assert inter.janus.tokenizer.decode(laid.text[laid.text != NO_LABEL], skip_special_tokens=True) == " ".join(texts)
    ends = (laid.text == inter.special["eos"]).sum()
    assert ends == len(texts)
    learnt = [segment for segment in segments if segment.kind == "image" and segment.loss]
    codes = [nearest_codes(inter.model.model.vqmodel, inter.pixels(segment.image))[0] for segment in learnt]
    assert torch.equal(laid.image[laid.image != NO_LABEL], torch.cat(codes) if codes else laid.image[:0])
    sums = losses(inter, [segments])
    assert sums["text"][1] == (laid.text != NO_LABEL).sum() and sums["image"][1] == inter.tokens * len(learnt)


@torch.no_grad()
def test_losses_are_the_scores_of_the_same_conversation(inter):
    """Against the scoring that GRPO uses: prompt and plan; and prompt, plan and picture token by
    token."""
    segments = conversation("initial_full_learning")
    prompt, thought, picture = segments
    janus = inter.janus
    ids, mask = janus.encode([janus.chat.plan(prompt.text)])
    tokens = torch.tensor([[*janus.tokenizer(thought.text, add_special_tokens=False).input_ids, inter.special["eos"]]])
    scored = janus(plan=(ids, mask, tokens, torch.ones_like(tokens, dtype=torch.bool)))
    codes = nearest_codes(inter.model.model.vqmodel, inter.pixels(picture.image))
    before = torch.cat([ids, tokens[:, :-1], torch.tensor([[inter.special["boi"]]])], dim=1)
    drawn = janus(image=(before, torch.ones_like(before), codes))
    sums = losses(inter, [segments])
    assert sums["text"][0] == pytest.approx(-scored.logprobs.sum().item(), rel=1e-5)
    assert sums["image"][0] == pytest.approx(-drawn.logprobs.sum().item(), rel=1e-5)


@torch.no_grad()
def test_a_batch_loses_what_its_conversations_lose(inter):
    several = [conversation(mode, number % 4) for number, mode in enumerate(MODES)]
    together, alone = losses(inter, several), [losses(inter, [segments]) for segments in several]
    for kind in ("text", "image"):
        assert together[kind][1] == sum(segments[kind][1] for segments in alone)
        assert together[kind][0] == pytest.approx(sum(segments[kind][0] for segments in alone), rel=1e-5)


@torch.no_grad()
def test_drawing_and_writing_take_the_weights_that_were_prepared(tmp_path):
    """Also those of the eyes: what trains on changes nothing until the next `prepare`."""
    janus = load_tiny_janus(save_tiny_janus(tmp_path))
    inter, contexts = InterleavedJanus(janus), [conversation("improving_full_learning")[:-1]]
    inter.prepare()
    before = inter.write(contexts, "reflect", [1], 24, 1.0), inter.sample([contexts], "redraw", (), [2], 1.0).tokens
    for value in (value for name, value in inter.named_parameters() if "vqmodel" not in name):  # never trained
        value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    after = inter.write(contexts, "reflect", [1], 24, 1.0), inter.sample([contexts], "redraw", (), [2], 1.0).tokens
    assert after[0] == before[0] and torch.equal(after[1], before[1])
    inter.prepare()
    assert inter.write(contexts, "reflect", [1], 24, 1.0) != before[0]


def test_memory_is_given_back_where_it_is_asked(tmp_path):
    inter, context = (
        InterleavedJanus(load_tiny_janus(save_tiny_janus(tmp_path))),
        conversation("initial_full_learning")[:1],
    )
    inter.prepare()
    inter.done()
    inter.write([context], "think", [1], 4, 1.0)
    inter.janus.engine.options = replace(inter.janus.engine.options, keep=False)
    inter.done()
    assert inter.janus.engine.weights is None
    with pytest.raises(RuntimeError, match="was not called"):
        inter.write([context], "think", [1], 4, 1.0)


def test_a_picture_is_shown_only_to_the_encoders_that_are_asked_for(inter):
    target = conversation("initial_full_learning")  # learnt, and seen by nobody
    context = conversation("improving_thinking_generation_learning")  # seen by both
    looks = inter.look([target])
    assert len(looks.codes) == len(looks.drawn) == 1 and not looks.seen
    looks = inter.look([target, context])
    assert len(looks.drawn) == 2 and len(looks.seen) == 1


def branches(segments: list[Segment]) -> list[list[Segment]]:
    """Everything; without the reflection; without the picture."""
    return [
        segments,
        [segment for segment in segments if segment.role != "reflect"],
        [segment for segment in segments if segment.kind == "text"],
    ]


@pytest.mark.parametrize("guidance", [(4.0, 2.0), (1.0, 2.0), (4.0, 1.0), (1.0, 1.0)])
@torch.no_grad()
def test_drawing_with_caches_is_the_full_forward_of_every_branch(inter, guidance):
    """Greedy tokens of three caches of different lengths are the argmax of the written combination
    of three plain forwards."""
    contexts = [branches(conversation("improving_full_learning", number)[:-1]) for number in range(2)]
    drawn = inter.sample([list(row) for row in zip(*contexts, strict=True)], "redraw", guidance, [1, 2], 0.0)
    for row, context in enumerate(contexts):
        logits = []
        for segments in context:
            laid = inter.lay_out(segments, opening="redraw").embeds
            codes = inter.model.prepare_embeddings_for_image_generation(drawn.tokens[row : row + 1, :-1])[0]
            hidden = plain_hidden(inter, torch.cat([laid, codes]))
            logits.append(inter.model.model.generation_head(hidden[-inter.tokens :]))
        full, text, image = logits
        a = text + guidance[0] * (full - text)
        combined = image + guidance[1] * (a - image)
        top = combined.topk(2).values
        sure = top[:, 0] - top[:, 1] > 1e-3
        assert torch.equal(combined.argmax(-1)[sure], drawn.tokens[row][sure]) and sure.float().mean() > 0.9


@torch.no_grad()
def test_scales_of_one_are_the_conditional_branch(inter):
    contexts = [[branch] for branch in branches(conversation("improving_full_learning")[:-1])]
    guided_by_none = inter.sample(contexts, "redraw", (1.0, 1.0), [3], 1.0)
    alone = inter.sample(contexts[:1], "redraw", (), [3], 1.0)
    assert torch.equal(guided_by_none.tokens, alone.tokens)


def test_an_image_branch_equal_to_the_conditional_one_is_plain_guidance():
    c, t = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w_t, w_i = 4.0, 2.0
    assert torch.allclose(guided(torch.cat([c, t, c]), (w_t, w_i)), guided(torch.cat([c, t]), (1 + w_i * (w_t - 1),)))


@torch.no_grad()
def test_one_row_is_what_it_is_in_a_batch(inter):
    contexts = [branches(conversation("improving_full_learning", number)[:-1]) for number in range(3)]
    many = inter.sample([list(branch) for branch in zip(*contexts, strict=True)], "redraw", (4.0, 2.0), [5, 6, 7], 1.0)
    one = inter.sample([[branch] for branch in contexts[1]], "redraw", (4.0, 2.0), [6], 1.0)
    assert (many.tokens[1] == one.tokens[0]).float().mean() > 0.95  # rounding may turn a draw
    assert torch.allclose(many.logprobs[1, :1], one.logprobs[0, :1], atol=1e-4)


@torch.no_grad()
def test_another_first_picture_or_no_reflection_changes_what_comes_after(inter):
    segments = conversation("improving_full_learning")
    logits, _ = full_logits(inter, segments)
    other = [replace(segment, image=255 - segment.image) if segment.role == "draw" else segment for segment in segments]
    blank = [segment for segment in segments if segment.role != "reflect"]
    for changed in (other, blank):
        assert (full_logits(inter, changed)[0] - logits).abs().max() > 1e-2
    before, after = (losses(inter, [context])["text"][0] for context in (segments, other))
    assert abs(before - after) > 1e-2


@torch.no_grad()
def test_another_first_picture_is_reflected_on_otherwise(inter):
    """What `write` writes, of the same words and seeds."""
    context = conversation("improving_thinking_generation_learning")[:-1]
    other = [replace(segment, image=255 - segment.image) if segment.role == "draw" else segment for segment in context]
    seeds = list(range(8))
    texts = [inter.write([each_context] * 8, "reflect", seeds, 24, 1.0) for each_context in (context, context, other)]
    assert texts[0] == texts[1] != texts[2]


@torch.no_grad()
def test_a_target_and_a_neighbour_in_the_pack_are_seen_by_nobody(inter):
    """Another conversation in front of it in the row, and another last code, leave all other
    log-probs as they were."""
    mine = conversation("improving_full_learning")
    rows = [inter([[conversation("initial_full_learning", number), mine]])[0] for number in (1, 2)]
    for kind in ("image", "text"):
        one, other = (scored[kind][0][scored[kind][1] == 1] for scored in rows)
        assert len(one) and torch.allclose(one, other, atol=1e-5)
    codes = nearest_codes(inter.model.model.vqmodel, inter.pixels(mine[-1].image))[0]
    changed = codes.clone()
    changed[-1] = (codes[-1] + 1) % 8
    one, other = (
        inter([[[*mine[:-1], replace(mine[-1], drawn_as=drawn_codes)]]])[0] for drawn_codes in (codes, changed)
    )
    assert torch.equal(one["text"][0], other["text"][0]) and torch.equal(one["image"][0][:-1], other["image"][0][:-1])
    assert one["image"][0][-1] != other["image"][0][-1]


@torch.no_grad()
def test_a_systems_text_is_learnt_in_the_wording_that_the_docs_draw_with(inter):
    prompt = Segment("prompt", text="three red circles")
    learnt = inter.wording.ids(prompt, [Segment("system", text="Think first."), prompt])
    chat = inter.janus.chat
    try:
        inter.janus.chat = replace(chat, system="Think first.", instruction="{prompt}")
        assert inter.wording.ids(prompt, [prompt]) == learnt
    finally:
        inter.janus.chat = chat
    assert inter.wording.ids(prompt, [prompt]) != learnt


def test_a_wording_that_cannot_be_filled_in_is_refused():
    for wording in ("draw {foo}", "draw {prompt.x}", "draw {", "draw {}"):
        with pytest.raises(UserError, match="model.chat.instruction may hold {prompt}"):
            Chat("", wording)


def test_texts_survive_being_decoded_and_read_again(inter):
    for number in range(4):
        for segment in conversation("improving_full_learning", number):
            if segment.kind == "text":
                ids = inter.janus.tokenizer(segment.text, add_special_tokens=False).input_ids
                again = inter.janus.tokenizer.decode(ids, skip_special_tokens=True)
                assert inter.janus.tokenizer(again, add_special_tokens=False).input_ids == ids


@torch.no_grad()
def test_written_texts_depend_on_their_own_seed_and_picture(inter):
    context = conversation("improving_thinking_generation_learning")[:-1]
    one = inter.write([context, context], "reflect", [1, 2], 24, 1.0)
    assert inter.write([context], "reflect", [2], 24, 1.0) == one[1:] != one[:1]


@torch.no_grad()
def test_the_librarys_own_encoder_finds_other_codes(inter):
    """It does not normalise before the search, which is how these codebooks are read."""
    vq = inter.model.model.vqmodel
    pixels = torch.cat([inter.pixels(render(scene)) for _, scene in EXAMPLES])
    ours, theirs = nearest_codes(vq, pixels), vq.encode(pixels).image_tokens.view(len(pixels), -1)
    z = torch.nn.functional.normalize(vq.quant_conv(vq.encoder(pixels)).double(), dim=1).flatten(2).transpose(1, 2)
    book = torch.nn.functional.normalize(vq.quantize.embedding.weight.double(), dim=1)
    brute = torch.cdist(z, book.expand(len(z), -1, -1)).argmin(-1)
    assert torch.equal(ours, brute) and (ours != theirs).any()


@torch.no_grad()
def test_the_first_picture_is_guided_as_janus_guides(inter):
    """The same tokens as `draw_images` gives for the same conversation: its unconditional is the
    first round's negative."""
    prompt, thought = conversation("initial_full_learning")[:2]
    janus = inter.janus
    ids, mask = janus.encode([janus.chat.plan(prompt.text)])
    tail = janus.tokenizer(thought.text, add_special_tokens=False).input_ids + [inter.special["boi"]]
    ids = torch.cat([ids, torch.tensor([tail])], dim=1)
    theirs = decode_image(
        janus.engine, ids, torch.ones_like(ids), [9], count=inter.tokens, special=inter.special, guidance_scale=3.0
    )
    ours = inter.sample([[[prompt, thought]], [None]], "draw", (3.0,), [9], 1.0)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


LOOP = {"max_tokens": 24, "text_temperature": 1.0, "retries": 40}


@torch.no_grad()
def test_a_trajectory_depends_on_its_own_seed_and_every_round_sees_the_last(inter):
    prompts = [prompt.text for prompt, _ in EXAMPLES[:2]]
    both = Rounds(rounds=3, **LOOP).run(inter, prompts, [1, 2])
    roles = [segment.role for segment in both[0].segments]
    assert roles == ["prompt", "think", "draw", "reflect", "redraw", "reflect", "redraw"]
    alone = Rounds(rounds=3, **LOOP).run(inter, prompts[1:], [2])[0]
    assert [segment.text for segment in alone.segments[:2]] == [segment.text for segment in both[1].segments[:2]]
    assert both[0].settings["rounds"] == 3 and all(
        segment.seen_by == BOTH for segment in both[0].segments if segment.kind == "image"
    )


@torch.no_grad()
def test_the_window_has_the_shape_of_training(inter):
    segments = conversation("improving_full_learning")
    more = [*segments, Segment("reflect", text="more")]
    assert [segment.text or segment.role for segment in windowed(more)] == [
        segments[0].text,
        segments[3].text,
        "draw",
        "more",
    ]
    assert windowed(segments[:2]) == segments[:2]
    assert [segment.role for segment in without_reflection(more)] == ["prompt", "think", "draw", "reflect", "redraw"]
    assert without_images(more) == [segment for segment in more if segment.kind == "text"]
    Rounds(rounds=3, policy="window", **LOOP).run(inter, [EXAMPLES[0][0].text], [3])
