"""Parity of every decoding and scoring path, on a random Janus of the real classes loaded through
the real path."""

from dataclasses import replace

import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.loading import cannot_load
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.engine.decode import decode_image, decode_text
from t2i_rl.models.autoregressive.engine.rows import unconditional
from t2i_rl.models.autoregressive.engine.score import score_image, score_text
from t2i_rl.models.autoregressive.engine.stats import self_certainty
from t2i_rl.models.autoregressive.janus import Janus
from tests.support.tiny import CHAT, load_tiny_janus, save_tiny_janus

TEXTS = ["a red circle", "a drawing of a green cross left of a black triangle", "three blue squares"]
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Janus:
    return load_tiny_janus(save_tiny_janus(tmp_path_factory.mktemp("janus")))


def image_rows(janus, texts=TEXTS):
    return janus.encode([janus.chat.image(text) for text in texts], boi=True)


def draw(janus, ids, mask, seeds, guidance_scale=3.0, temperature=1.0):
    drawn = decode_image(
        janus.engine.load(janus.model),
        ids,
        mask,
        seeds,
        count=64,
        special=janus.special,
        guidance_scale=guidance_scale,
        temperature=temperature,
    )
    return drawn.tokens, drawn.logprobs


def write(janus, ids, mask, seeds, max_tokens):
    engine = janus.engine.load(janus.model)
    return decode_text(engine, ids, mask, seeds, max_tokens=max_tokens, eos=janus.special["eos"])


def test_chat_tags_are_single_tokens_and_bos_stands_once(janus):
    ids, mask = janus.encode([janus.chat.plan(TEXTS[0])])
    row = ids[0].tolist()
    assert row.count(janus.special["bos"]) == 1 and row[0] == janus.special["bos"]
    assert row.count(janus.special["user"]) == 1 and row.count(janus.special["assistant"]) == 1
    assert mask.all()


def test_conversations_are_worded_as_the_paper_has_them():
    chat = Chat("Be brief.", 'Describe "{prompt}".')
    assert chat.plan(" a cat ") == 'Be brief.\n\n<|User|>: Describe "a cat".\n\n<|Assistant|>:'
    assert chat.image("a cat.", "a grey cat.") == "<|User|>: a cat. a grey cat.\n\n<|Assistant|>:"
    assert chat.image("a cat") == "<|User|>: a cat\n\n<|Assistant|>:"


def test_our_conversation_is_the_tokenizers_chat_template(janus):
    text = janus.tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[0]}], tokenize=False, add_generation_prompt=True
    )
    assert text == janus.chat.image(TEXTS[0])


@pytest.mark.parametrize("guidance_scale", [2.0, 5.0])
def test_greedy_tokens_are_transformers_own(janus, guidance_scale):
    ids, mask = image_rows(janus)
    expected = janus.model.generate(
        inputs=ids,
        attention_mask=mask,
        generation_mode="image",
        do_sample=False,
        guidance_scale=guidance_scale,
        use_cache=True,
    )
    drawn, _ = draw(janus, ids, mask, SEEDS, guidance_scale, temperature=0)
    assert drawn.unique().numel() > 5
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("distribution", ["conditional", "guided"])
def test_cached_decoding_and_teacher_forcing_agree(janus, distribution):
    ids, mask = image_rows(janus)
    scale = 1.0 if distribution == "conditional" else 3.0
    tokens, behaviour = draw(janus, ids, mask, SEEDS, guidance_scale=scale)
    stats = score_image(
        janus.model, ids, mask, tokens, special=janus.special, distribution=distribution, guidance_scale=3.0
    )
    torch.testing.assert_close(stats.logprobs, behaviour, rtol=1e-4, atol=1e-4)


def test_batch_order_and_padding_change_nothing(janus):
    together = janus.generate(TEXTS, SEEDS)
    turned = janus.generate(TEXTS[::-1], SEEDS[::-1])
    for row, (text, seed) in enumerate(zip(TEXTS, SEEDS, strict=True)):
        alone = janus.generate([text], [seed])
        assert alone.plans[0] == together.plans[row] == turned.plans[-1 - row]
        assert torch.equal(alone.image_ids[0], together.image_ids[row])
        assert torch.equal(turned.image_ids[-1 - row], together.image_ids[row])


def test_extra_left_padding_changes_no_score(janus):
    ids, mask = image_rows(janus, TEXTS[:1])
    tokens, _ = draw(janus, ids, mask, SEEDS[:1])
    pad = torch.full((1, 7), janus.special["pad"])
    settings = {"special": janus.special, "distribution": "guided", "guidance_scale": 3.0}
    plain = score_image(janus.model, ids, mask, tokens, **settings)
    padded = score_image(
        janus.model, torch.cat([pad, ids], dim=1), torch.cat([torch.zeros_like(pad), mask], dim=1), tokens, **settings
    )
    torch.testing.assert_close(plain.logprobs, padded.logprobs, rtol=1e-4, atol=1e-4)


def test_a_plan_ends_at_its_first_eos(janus):
    ids, mask = janus.encode([janus.chat.plan(text) for text in TEXTS * 8])
    eos = janus.special["eos"]
    tokens, live = write(janus, ids, mask, list(range(24)), max_tokens=64)
    ended = 0
    for row, alive in zip(tokens, live, strict=True):
        ends = (row == eos).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(row)
        ended += bool(ends)
        assert alive.tolist() == [t < length for t in range(len(row))]
        assert (row[length:] == eos).all()
    assert ended > 0


def test_text_scores_ignore_what_follows_the_end(janus):
    ids, mask = janus.encode([janus.chat.plan(TEXTS[0])])
    tokens = torch.tensor([[20, 21, janus.special["eos"]]])
    longer = torch.cat([tokens, torch.full((1, 4), janus.special["eos"])], dim=1)
    live = torch.ones_like(tokens, dtype=torch.bool)
    short = score_text(janus.model, ids, mask, tokens, live)
    padded = score_text(janus.model, ids, mask, longer, torch.cat([live, torch.zeros(1, 4, dtype=torch.bool)], dim=1))
    torch.testing.assert_close(short.self_certainty, padded.self_certainty[:, :3], rtol=1e-5, atol=1e-6)
    assert (padded.self_certainty[:, 3:] == 0).all()


def test_image_scores_come_from_the_image_head_at_the_right_positions(janus):
    """First target predicted at begin-of-image; vocabulary of the statistics is the codebook, not
    the language head's."""
    ids, mask = image_rows(janus, TEXTS[:1])
    tokens, _ = draw(janus, ids, mask, SEEDS[:1], guidance_scale=1.0)
    with torch.no_grad():
        hidden = janus.model.model.language_model(
            inputs_embeds=janus.model.get_input_embeddings()(ids), attention_mask=mask
        )
        logits = janus.model.model.generation_head(hidden.last_hidden_state[:, -1])
    stats = score_image(
        janus.model, ids, mask, tokens, special=janus.special, distribution="conditional", guidance_scale=3.0
    )
    assert logits.shape[-1] == 48
    torch.testing.assert_close(stats.self_certainty[:, 0], self_certainty(logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        stats.logprobs[:, 0], logits.log_softmax(-1)[0, tokens[0, 0]][None], rtol=1e-4, atol=1e-5
    )


def test_the_unconditional_prompt_keeps_only_bos_and_begin_of_image(janus):
    ids, _ = image_rows(janus, TEXTS[:1])
    bare = unconditional(ids, janus.special)[0].tolist()
    assert (
        bare[0] == janus.special["bos"]
        and bare[-1] == janus.special["boi"]
        and set(bare[1:-1]) == {janus.special["pad"]}
    )


def test_images_are_the_models_own_decoding(janus):
    tokens = torch.randint(0, 48, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = janus.model.decode_image_tokens(tokens)
    expected = ((pixels + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8).numpy()
    assert (janus.decode(tokens) == expected).all() and expected.shape == (2, 32, 32, 3)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_scores_and_gradients_do_not_depend_on_the_chunk(janus, monkeypatch, kind):
    ids, mask = image_rows(janus) if kind == "image" else janus.encode([janus.chat.plan(text) for text in TEXTS])
    tokens, live = (draw(janus, ids, mask, SEEDS)[0], None) if kind == "image" else write(janus, ids, mask, SEEDS, 12)
    if kind == "text":
        live[0, 5:] = False
    head = janus.model.lm_head if kind == "text" else janus.model.model.generation_head
    chunk_sizes: list[int] = []
    hook = head.register_forward_hook(lambda module, args, out: chunk_sizes.append(len(out)))

    def scores_and_gradient():
        chunk_sizes.clear()
        janus.model.zero_grad()
        stats = (
            janus(image=(ids, mask, tokens), distribution="guided")
            if kind == "image"
            else janus(plan=(ids, mask, tokens, live))
        )
        (stats.logprobs * torch.linspace(-1, 1, stats.logprobs.numel()).view_as(stats.logprobs)).sum().backward()
        gradient = {name: p.grad.clone() for name, p in janus.model.named_parameters() if p.grad is not None}
        return stats, gradient, list(chunk_sizes)

    whole, gradient, calls = scores_and_gradient()
    vocabulary = 48 if kind == "image" else janus.model.config.text_config.vocab_size
    monkeypatch.setattr("t2i_rl.models.autoregressive.engine.score.CHUNK_BYTES", 4 * vocabulary * 7)
    cut, gradient_cut, calls_cut = scores_and_gradient()
    hook.remove()
    janus.model.zero_grad()
    assert len(calls) == 1 and max(calls_cut) <= (14 if kind == "image" else 7)
    assert sum(calls_cut) == 2 * calls[0]  # each chunk once forward and once again on the way back
    for name in ("logprobs", "self_certainty", "entropy"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    assert gradient.keys() == gradient_cut.keys() and len(gradient) > 10
    for name in gradient:
        torch.testing.assert_close(gradient_cut[name], gradient[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damage", ["missing", "other", "truncated", "gone"])
def test_a_bad_checkpoint_gets_one_clear_line(tmp_path, damage):
    folder = tmp_path / "janus"
    save_tiny_janus(folder)
    if damage == "missing":
        folder = tmp_path / "nowhere"
    elif damage == "other":
        (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    elif damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        Janus(str(folder), CHAT)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_weights_go_straight_to_their_dtype_and_device(janus, tmp_path):
    folder = save_tiny_janus(tmp_path)
    for device, dtype in (("cpu", "bfloat16"), ("auto", "float32")):
        loaded = load_tiny_janus(folder, device=device, dtype=dtype)
        kinds = {(str(p.device.type), p.dtype) for p in loaded.model.parameters()}
        assert kinds == {("cuda" if device == "auto" and torch.cuda.is_available() else "cpu", getattr(torch, dtype))}
    if not torch.cuda.is_available():
        assert loaded.generate(TEXTS, SEEDS).plans == janus.generate(TEXTS, SEEDS).plans


@pytest.mark.parametrize(
    ("path", "message", "fix"),
    [
        ("some/model", "You are trying to access a gated repo.\nMake sure to have access", "HF_TOKEN"),
        ("some/model", "We couldn't connect to the hub\nand more", "hf download some/model"),
        ("./nowhere", "anything", "no such folder"),
    ],
)
def test_what_cannot_be_loaded_names_the_fix(path, message, fix):
    text = str(cannot_load(path, OSError(message)))
    assert fix in text and path in text and "\n" not in text


def test_a_prompts_full_stop_is_stripped_before_its_plan_or_kept_as_released():
    keeps_stop = Chat("", "{prompt}", final_stop="keep")
    assert keeps_stop.image(" a cat. ", "a grey cat") == "<|User|>: a cat.. a grey cat\n\n<|Assistant|>:"
    assert Chat("", "{prompt}").image(" a cat. ", "a grey cat") == "<|User|>: a cat. a grey cat\n\n<|Assistant|>:"
    assert keeps_stop.image("a cat.") == Chat("", "{prompt}").image("a cat.") == "<|User|>: a cat.\n\n<|Assistant|>:"
    with pytest.raises(UserError, match="strip or keep, not 'both'"):
        Chat("", "{prompt}", final_stop="both")


def test_pictures_of_another_full_stop_are_not_taken_for_the_same(janus):
    assert janus.chat.final_stop == "strip"
    before, chat = janus.sampling(), janus.chat
    janus.chat = replace(chat, final_stop="keep")
    assert janus.sampling() != before
    janus.chat = chat
