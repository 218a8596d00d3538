"""The hooks that put soft tokens into stock denoisers: exact no-ops, exact equivalences, exact
gradients."""

import copy

import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.models.diffusion.soft_tokens import Attached, SoftTokens, spec_for
from t2i_rl.models.diffusion.splice import KEY, Splice, carrier, layout_of, text_blocks
from tests.support.small_diffusers import DENOISERS, TEXT, denoiser, inputs

UNETS = ("sd15", "sdxl")


def layers(name: str):
    return ["down", "mid"] if name in UNETS else 2


def bank_for(model, name: str, tokens: int = 3, std: float = 1.0, **options) -> SoftTokens:
    spec = spec_for(model, layers(name), tokens, **options)
    return SoftTokens(spec, std=std, generator=torch.Generator().manual_seed(5))


def run(model, name: str, **extra) -> torch.Tensor:
    return model(**inputs(name), **extra)[0]


@pytest.mark.parametrize("training", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", DENOISERS)
def test_no_tokens_change_no_bit_and_any_token_changes_the_output(name, training):
    model = denoiser(name).train(training)
    if training:
        model.enable_gradient_checkpointing()
    before = run(model, name)
    with Attached(model, bank_for(model, name, tokens=0)):
        assert torch.equal(run(model, name), before)
    splice = Splice(model, layout_of(model, layers(name)), provide=lambda t, call: None)
    assert torch.equal(run(model, name), before)
    splice.remove()
    with Attached(model, bank_for(model, name)) as handle:
        assert (run(model, name) - before).abs().max() > 1e-4
        with handle.disabled():
            assert torch.equal(run(model, name), before)
    zeros = bank_for(model, name, std=0.0)
    with Attached(model, zeros):  # zero vectors are tokens too: they take attention
        assert (run(model, name) - before).abs().max() > 1e-5
    assert torch.equal(run(model, name), before)


@pytest.mark.parametrize("name", DENOISERS)
def test_where_in_the_text_tokens_stand_does_not_matter(name):
    model, outputs = denoiser(name), []
    for position in ("start", "after_bos", "end"):
        bank = bank_for(model, name, position=position)
        with Attached(model, bank):
            outputs.append(run(model, name))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("position, start", [("start", 0), ("after_bos", 1), ("end", TEXT)])
@pytest.mark.parametrize("name", DENOISERS)
def test_blocks_see_their_own_layer_and_leave_the_text_as_long_as_it_was(name, position, start):
    """What each block reads and where, and that tokens neither pile up nor reach blocks beyond the
    layout."""
    model, texts = denoiser(name), {}
    bank = bank_for(model, name, position=position)
    blocks = dict(model.named_modules())
    tokens = bank(inputs(name)["timestep"] * (1000 if name == "flux" else 1))
    with Attached(model, bank):
        for block in text_blocks(model):

            def look(module, args, kwargs, block=block):
                texts[block] = kwargs["encoder_hidden_states"]
                assert KEY not in (kwargs.get(carrier(model)) or {})

            blocks[block].register_forward_pre_hook(look, with_kwargs=True)
        run(model, name)
    layout = layout_of(model, layers(name))
    for block, text in texts.items():
        assert text.shape[1] == TEXT + 3 * (block in layout)
        if block in layout:
            torch.testing.assert_close(text[:, start : start + 3], tokens[:, layout[block]])
    assert set(layout) < set(texts)


def test_flux_turns_tokens_as_its_own_embedder_turns_a_longer_text():
    model, arguments = denoiser("flux"), {}
    call = inputs("flux")
    longer = torch.cat([call["txt_ids"].new_zeros(TEXT + 3, 3), call["img_ids"]])
    with Attached(model, bank_for(model, "flux")):
        block = model.transformer_blocks[0]
        block.register_forward_pre_hook(lambda m, a, k: arguments.update(k), with_kwargs=True)
        run(model, "flux")
    for rotary, expected in zip(arguments["image_rotary_emb"], model.pos_embed(longer), strict=True):
        assert torch.equal(rotary, expected)


def test_upper_layers_are_the_first_and_unets_choose_their_parts():
    assert layout_of(denoiser("sd3"), 2) == {"transformer_blocks.0": 0, "transformer_blocks.1": 1}
    assert layout_of(denoiser("flux"), None) == {
        "transformer_blocks.0": 0,
        "transformer_blocks.1": 1,
        "single_transformer_blocks.0": 2,
        "single_transformer_blocks.1": 3,
    }
    assert layout_of(denoiser("sd15"), ["down", "mid"]) == {"down_blocks.0": 0, "mid_block": 0}
    assert layout_of(denoiser("sdxl"), ["up"]) == {"up_blocks.0": 0}
    for model, wrong in (("sd3", 4), ("sd3", ["down"]), ("sd15", 2), ("sd15", ["side"]), ("sd15", [])):
        with pytest.raises(UserError, match="layers"):
            layout_of(denoiser(model), wrong)
    with pytest.raises(UserError, match="soft tokens go into"):
        layout_of(torch.nn.Linear(2, 2), 1)


@pytest.mark.parametrize("name", DENOISERS)
def test_gradient_checkpointing_changes_no_gradient_with_two_passes_alive(name):
    """Two branches run before one backward: a recomputed block must read the tokens of its own
    call, and not those that an attribute of the model holds by then."""
    gradients = []
    for checkpointed in (False, True):
        model = denoiser(name).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.requires_grad_(False)
        bank = bank_for(model, name, branches=2)
        splice = Splice(model, bank.spec.layout)
        t = torch.tensor([37.0, 911.0])
        call = inputs(name)
        grads = []
        outputs = [model(**call, **{carrier(model): {KEY: bank(t, branch)}})[0] for branch in (0, 1)]
        loss = (outputs[0] * outputs[1]).sum() + outputs[0].square().sum()
        loss.backward()
        grads = [bank.tokens.grad.clone(), bank.time.grad.clone()]
        gradients.append(grads)
        splice.remove()
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 1e-3
        assert torch.equal(plain, again)


@pytest.mark.parametrize("name", DENOISERS)
def test_rows_are_independent_and_each_row_reads_its_own_time(name):
    model = denoiser(name)
    bank = bank_for(model, name)
    call = inputs(name)
    with Attached(model, bank):
        both = model(**call)[0]
        for row in range(2):
            alone = {
                key: value[row : row + 1] if torch.is_tensor(value) and key not in ("img_ids", "txt_ids") else value
                for key, value in call.items()
            }
            if name == "sdxl":
                alone["added_cond_kwargs"] = {k: v[row : row + 1] for k, v in call["added_cond_kwargs"].items()}
            torch.testing.assert_close(model(**alone)[0], both[row : row + 1], atol=1e-5, rtol=1e-4)


def test_a_pipelines_scalar_time_and_fluxs_unit_time_reach_the_right_bucket():
    for name, given, bucket in (
        ("sd15", torch.tensor(999), 99),
        ("sd3", torch.tensor([30.5, 30.5]), 3),
        ("flux", torch.tensor([0.5, 0.5]), 50),
    ):
        model, times_seen = denoiser(name), []
        bank = bank_for(model, name)
        splice = Splice(
            model,
            bank.spec.layout,
            provide=lambda t, call, times_seen=times_seen, bank=bank: (times_seen.append(t), bank(t))[1],
        )
        call = inputs(name) | {"timestep": given}
        if name == "sd15":
            model(call["sample"], call["timestep"], encoder_hidden_states=call["encoder_hidden_states"])
        else:
            model(**call)
        splice.remove()
        assert times_seen[0].shape == (2,)
        torch.testing.assert_close(
            bank(times_seen[0])[:, 0], bank.tokens[0, 0] + bank.time[0, bucket, 0].expand(2, 1, -1)
        )


def test_an_attention_mask_grows_with_the_tokens():
    """A masked text must give what the shorter text gives, tokens or not."""
    model = denoiser("sd15")
    call = inputs("sd15")
    mask = torch.ones(2, TEXT)
    mask[:, -2:] = 0
    for bank in (None, bank_for(model, "sd15", position="after_bos"), bank_for(model, "sd15")):
        handle = Attached(model, bank) if bank is not None else None
        masked = model(**call, encoder_attention_mask=mask)[0]
        shorter = model(**call | {"encoder_hidden_states": call["encoder_hidden_states"][:, :-2]})[0]
        torch.testing.assert_close(masked, shorter, atol=1e-5, rtol=1e-4)
        if handle:
            handle.remove()


def test_soft_tokens_of_a_joint_block_are_keys_and_values_behind_its_own_norm():
    """The splice against an independent computation: attention over normalised tokens as extra
    keys."""
    model = denoiser("sd3")
    bank = bank_for(model, "sd3", tokens=2, buckets=0)
    block, call = model.transformer_blocks[0], inputs("sd3")
    with torch.no_grad():
        hidden = model.pos_embed(call["hidden_states"])
        temb = model.time_text_embed(call["timestep"], call["pooled_projections"])
        text = model.context_embedder(call["encoder_hidden_states"])
        tokens = bank.tokens[0, 0].expand(2, -1, -1)
        query_image, query_text = _attend(block, hidden, text, tokens, temb)
        outputs = {}
        block.attn.register_forward_hook(lambda module, args, output: outputs.update(image=output[0], text=output[1]))
        with Attached(model, bank):
            model(**call)
    torch.testing.assert_close(outputs["image"], query_image, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["text"][:, :TEXT], query_text, atol=1e-5, rtol=1e-4)


def _attend(block, hidden, text, tokens, temb):
    attn, heads = block.attn, 4
    image = block.norm1(hidden, emb=temb)[0].double()
    words = block.norm1_context(text, emb=temb)[0].double()
    extra = block.norm1_context(tokens, emb=temb)[0].double()
    attn = copy.deepcopy(attn).double()

    def split(x):
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    queries = torch.cat([attn.to_q(image), attn.add_q_proj(words)], dim=1)
    keys = torch.cat([attn.to_k(image), attn.add_k_proj(words), attn.add_k_proj(extra)], dim=1)
    values = torch.cat([attn.to_v(image), attn.add_v_proj(words), attn.add_v_proj(extra)], dim=1)
    scores = split(queries) @ split(keys).transpose(-1, -2) / (queries.shape[-1] // heads) ** 0.5
    out = (scores.softmax(-1) @ split(values)).transpose(1, 2).flatten(2)
    pixels = hidden.shape[1]
    return attn.to_out[0](out[:, :pixels]).float(), attn.to_add_out(out[:, pixels:]).float()
