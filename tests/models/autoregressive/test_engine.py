"""The engine against the plain model: the same numbers on every path, nothing read back by the
host, no more memory than it says."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from t2i_rl.core.errors import UserError
from t2i_rl.methods.trainable import select_trainable
from t2i_rl.models.autoregressive.engine import memory
from t2i_rl.models.autoregressive.engine.decode import decode_text
from t2i_rl.models.autoregressive.engine.emit import ImageEmitter
from t2i_rl.models.autoregressive.engine.engine import Engine, EngineOptions
from t2i_rl.models.autoregressive.engine.rows import unconditional
from t2i_rl.models.autoregressive.janus import Janus
from tests.support.tiny import CHAT, load_tiny_janus, save_tiny_janus

TEXTS = ["a red circle", "a drawing of a green cross left of a black triangle", "three blue squares"]
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture
def janus(folder) -> Janus:
    return load_tiny_janus(folder)


def grouped(folder: str, source: str) -> str:
    """A Janus whose heads share keys and values in pairs and whose projections have biases, with
    random weights."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    config = JanusConfig.from_pretrained(source)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 4, 2
    config.text_config.head_dim, config.text_config.attention_bias = 16, True
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_(std=0.3)
        model.model.generation_head.vision_head.weight.mul_(25)
        model.model.generation_embeddings.weight.normal_()
    load_tiny_janus(source).tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def draw(janus: Janus, texts=TEXTS, seeds=SEEDS):
    janus.prepare()
    return janus.draw_images(texts, [""] * len(texts), seeds)


def write(janus: Janus, texts=TEXTS, seeds=SEEDS):
    janus.prepare()
    return janus.draw_plans(texts, seeds)


@pytest.mark.parametrize(("dtype", "mean", "most"), [("float32", 1e-5, 1e-4), ("bfloat16", 0.03, 0.3)])
def test_what_decoding_sees_is_what_the_plain_forward_gives(folder, dtype, mean, most):
    """Log-probs and both self-certainties of every drawn token.

    Tolerances are nats; logits here spread over tens of nats.
    """
    janus = load_tiny_janus(folder, dtype=dtype)
    (ids, mask), drawn = draw(janus, TEXTS * 4, list(range(12)))
    for distribution, certainty in (
        ("conditional", drawn.conditional_self_certainty),
        ("guided", drawn.guided_self_certainty),
    ):
        stats = janus(image=(ids, mask, drawn.tokens), distribution=distribution)
        gap = (stats.self_certainty - certainty).abs()
        assert gap.mean() < mean and gap.max() < most
    gap = (stats.logprobs - drawn.logprobs).abs()
    assert gap.mean() < mean and gap.max() < most
    assert drawn.logprobs.dtype == torch.float32 and drawn.tokens.unique().numel() > 10


def test_a_bfloat16_rollout_of_a_float32_model_stays_near_it(folder):
    janus = load_tiny_janus(folder, rollout=EngineOptions(dtype="bfloat16"))
    (ids, mask), drawn = draw(janus)
    assert janus.engine.dtype == torch.bfloat16 and janus.model.lm_head.weight.dtype == torch.float32
    gap = (janus(image=(ids, mask, drawn.tokens), distribution="guided").logprobs - drawn.logprobs).abs()
    assert 0 < gap.mean() < 0.03


def test_autocast_decides_the_dtype_once(folder, janus):
    """What `prepare` read in float32 is drawn with in float32, also where training has autocast on;
    read under it, in bfloat16."""
    plain = draw(janus)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = janus.draw_images(TEXTS, [""] * 3, SEEDS)[1]
        under = draw(load_tiny_janus(folder))[1]
    assert torch.equal(inside.tokens, plain.tokens) and torch.equal(inside.logprobs, plain.logprobs)
    assert not torch.equal(under.logprobs, plain.logprobs)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_shared_heads_and_biases_decode_as_transformers_does(folder, tmp_path, guidance_scale):
    janus = Janus(grouped(tmp_path, folder), CHAT, guidance_scale=guidance_scale, temperature=0)
    (ids, mask), drawn = draw(janus)
    with torch.no_grad():
        rows = ids if guidance_scale == 1 else torch.cat([ids, unconditional(ids, janus.special)])
        row_mask = mask if guidance_scale == 1 else torch.cat([mask, mask])
        for t in range(8):
            image = janus.model.prepare_embeddings_for_image_generation(drawn.tokens[:, :t])
            embeds = torch.cat([janus.model.get_input_embeddings()(rows), image.repeat(len(rows) // len(ids), 1, 1)], 1)
            full = torch.cat([row_mask, torch.ones(len(rows), t, dtype=row_mask.dtype)], 1)
            hidden = janus.model.model.language_model(
                inputs_embeds=embeds, attention_mask=full, position_ids=(full.cumsum(-1) - 1).clamp(min=0)
            ).last_hidden_state[:, -1]
            logits = janus.model.model.generation_head(hidden)
            if guidance_scale != 1:
                logits = logits[3:] + guidance_scale * (logits[:3] - logits[3:])
            assert torch.equal(drawn.tokens[:, t], logits.argmax(-1))


def test_a_shared_prefix_gives_what_each_row_with_its_own_gives(folder, tmp_path):
    for janus in (load_tiny_janus(folder), Janus(grouped(tmp_path, folder), CHAT, max_plan_tokens=12)):
        ids, mask = janus.encode([janus.chat.plan(text) for text in TEXTS])
        options = {"max_tokens": 12, "eos": janus.special["eos"]}
        engine = janus.engine.load(janus.model)
        shared, live = decode_text(engine, ids, mask, list(range(12)), **options)
        rows = ids.repeat_interleave(4, 0), mask.repeat_interleave(4, 0)
        own, own_live = decode_text(engine, *rows, list(range(12)), **options)
        assert torch.equal(shared, own) and torch.equal(live, own_live) and len(shared.unique(dim=0)) > 6


def test_equal_neighbours_are_read_as_one_prompt(janus, monkeypatch):
    prompt_counts = []
    original = janus.encode
    monkeypatch.setattr(janus, "encode", lambda texts, **kw: prompt_counts.append(len(texts)) or original(texts, **kw))
    (ids, mask), _, plans = write(janus, [TEXTS[0]] * 4 + [TEXTS[1]] * 4, list(range(8)))
    assert prompt_counts == [2] and len(ids) == len(mask) == len(plans) == 8
    write(janus, [TEXTS[0]] * 3 + [TEXTS[1]], list(range(4)))
    assert prompt_counts == [2, 4]


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_chunks_of_any_size_give_the_same(folder, max_rows):
    whole, cut = load_tiny_janus(folder), load_tiny_janus(folder, rollout=EngineOptions(max_rows=max_rows))
    texts, seeds = TEXTS * 2, list(range(6))
    assert torch.equal(draw(whole, texts, seeds)[1].tokens, draw(cut, texts, seeds)[1].tokens)
    for janus in (whole, cut):
        janus.max_plan_tokens = 64
    (_, (tokens, live), plans), (_, (cut_tokens, cut_live), cut_plans) = (
        write(janus, texts * 4, list(range(24))) for janus in (whole, cut)
    )
    assert len(live.sum(-1).unique()) > 2  # some end early: what follows must be EOS, not what an earlier chunk left
    assert torch.equal(tokens, cut_tokens) and torch.equal(live, cut_live) and plans == cut_plans


def test_recorded_lengths_give_what_exact_ones_give(janus):
    """As on a GPU: prefixes padded to 32, the whole cache laid out at once, attention over whole
    buckets of 64."""

    class Bucketed:
        records = True

        def fused(self, function):
            return function

        def run(self, step, length, state):
            lengths.append(length)
            step(length)

    lengths: list[int] = []
    ids, mask = janus.encode([janus.chat.image(text) for text in TEXTS], boi=True)
    rows = torch.cat([ids, unconditional(ids, janus.special)]), torch.cat([mask, mask])
    exact = draw(janus)[1].tokens
    engine = Engine().load(janus.model)
    session = engine.session(ImageEmitter, 6, 1, 32, 64, guidance=(3.0,), temperature=1.0)
    session.recorder, session.bucket, session.grows = Bucketed(), 64, False
    session.own.resize(96)
    session.prefill(*rows)
    session.emitter.start(torch.zeros(3, 64) + 0.5)
    plain = janus.engine.session(ImageEmitter, 6, 1, ids.shape[1], 64, guidance=(3.0,), temperature=1.0)
    session.emitter.uniforms.copy_(plain.emitter.uniforms)
    session.decode()
    assert torch.equal(session.emitter.tokens, exact) and set(lengths) == {96}


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_step_never_waits_for_the_host(janus, kind):
    """Under fake tensors whatever would read a value back raises."""
    draw(janus) if kind == "image" else write(janus, [TEXTS[0]] * 4, list(range(4)))
    (session,) = (session for _, session in janus.engine.sessions.values())
    session.slot.zero_()
    with FakeTensorMode(allow_non_fake_inputs=True):
        session.step(session.start + 8)
        with pytest.raises(DataDependentOutputException):
            bool(torch.ones(2).sum() > 0)


def test_the_cache_is_exactly_as_long_as_needed(janus):
    """Also on a CPU, where it grows to that; in the middle it has room for 32 more at most."""
    (ids, _), _ = draw(janus)
    (session,) = (session for _, session in janus.engine.sessions.values())
    keys, values = session.own[0]
    assert keys.shape == (6, 2, 32, ids.shape[1] + 64) and values.shape == (6, 2, ids.shape[1] + 64, 32)
    held = sum(part.nbytes for pair in session.own.layers for part in pair)
    assert held == session.own.nbytes() == session.cache_bytes() == janus.engine.held_bytes(ImageEmitter)
    assert held == 6 * janus.engine.cache_bytes(ids.shape[1] + 64)


def test_new_weights_are_read_where_the_old_ones_lay(janus):
    before = draw(janus)[1].tokens
    addresses = [tensor.data_ptr() for tensor in janus.engine.weights.tensors()]
    with torch.no_grad():
        janus.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(-2)
    assert torch.equal(janus.draw_images(TEXTS, [""] * 3, SEEDS)[1].tokens, before)  # as read
    after = draw(janus)[1].tokens
    assert not torch.equal(after, before)
    assert [tensor.data_ptr() for tensor in janus.engine.weights.tensors()] == addresses
    fresh = Engine().load(janus.model)
    assert all(torch.equal(a, b) for a, b in zip(fresh.weights.tensors(), janus.engine.weights.tensors(), strict=True))


def test_a_rollout_keeps_its_memory_only_if_it_may(folder):
    for keep in (True, False):
        janus = load_tiny_janus(folder, rollout=EngineOptions(keep=keep))
        first = draw(janus)[1].tokens
        janus.engine.rollout_done()
        assert (janus.engine.weights is not None) == keep and bool(janus.engine.held_bytes(ImageEmitter)) == keep
        assert torch.equal(draw(janus)[1].tokens, first)


def test_adapters_are_merged_for_drawing(folder):
    janus = load_tiny_janus(folder)
    select_trainable(janus.model, [r"model\.language_model\.", r"lm_head\."], {"r": 4, "lora_alpha": 8})
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in janus.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (ids, mask), drawn = draw(janus)
    stats = janus(image=(ids, mask, drawn.tokens), distribution="guided")
    torch.testing.assert_close(stats.logprobs, drawn.logprobs, rtol=1e-3, atol=1e-3)
    assert not torch.equal(drawn.tokens, draw(load_tiny_janus(folder))[1].tokens)


def test_every_linear_of_a_step_is_counted_once(janus):
    """The roofline's bytes: the trunk without its embedding, and the image head."""
    janus.prepare()
    trunk, head = janus.model.model.language_model, janus.model.model.generation_head
    expected = sum(p.nbytes for p in [*trunk.parameters(), *head.parameters()]) - trunk.embed_tokens.weight.nbytes
    assert janus.engine.weights.bytes_per_step() == expected


def test_rows_are_counted_from_free_memory_and_none_is_one_line(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert memory.rows_that_fit(100, torch.device("cpu"), "drawing") == 8
    assert memory.rows_that_fit(100, torch.device("cpu"), "drawing", reusable=1000) == 16
    with pytest.raises(UserError, match="GiB") as error:
        memory.rows_that_fit(900, torch.device("cpu"), "drawing an image")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert 2**28 < memory.free_bytes(torch.device("cpu")) < 2**45


@pytest.mark.parametrize(("rows", "most"), [(7, 3), (64, 64), (5, 100), (9, 1)])
def test_chunks_are_even_and_cover_everything_once(rows, most):
    chunks = memory.even_chunks(rows, most)
    assert [i for part in chunks for i in range(rows)[part]] == list(range(rows))
    sizes = [part.stop - part.start for part in chunks]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


def test_an_unknown_rollout_dtype_is_one_line(folder):
    with pytest.raises(UserError, match="rollout.dtype"):
        load_tiny_janus(folder, rollout=EngineOptions(dtype="float99"))


def test_options_of_configs_reach_the_engine(folder):
    from hydra.utils import instantiate

    settings = {"_target_": "t2i_rl.models.autoregressive.janus.Janus", "path": folder, "chat": CHAT}
    rollout = {
        "_target_": "t2i_rl.models.autoregressive.engine.engine.EngineOptions",
        "max_rows": 3,
        "dtype": "bfloat16",
    }
    janus = instantiate({**settings, "rollout": rollout})
    assert janus.engine.options == EngineOptions(dtype="bfloat16", max_rows=3) and json.dumps(janus.sampling())
