"""Adapters over the stock diffusers pipelines: the same numbers as the pipeline, the scheduler and
the autoencoder themselves give."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from t2i_rl.core.errors import UserError
from t2i_rl.models.diffusion.base import TextEncoding
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, load_soft_tokens, spec_for
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from tests.support.small_diffusers import pipeline

KINDS = ("sd15", "sdxl", "sd3", "sd3_t5", "sd35")
STOCK = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPTS = ["a red circle", "three blue squares above a zebra"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: pipeline(kind, root / kind) for kind in KINDS}


def load(kind: str, folder, **settings):
    classes = {"sd15": StableDiffusion, "sdxl": StableDiffusionXL}
    extra = {} if kind in classes else {"max_sequence_length": 8}
    return classes.get(kind, SD3)(str(folder), **{"steps": 3, **extra, **settings}).requires_grad_(False)


def stock(kind: str, folder):
    absent = {} if kind in ("sd15", "sdxl", "sd3_t5") else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = STOCK.get(kind, StableDiffusion3Pipeline).from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made_bank(model, **options) -> SoftTokens:
    spec = spec_for(model.denoiser, None, 4, **options)
    return SoftTokens(spec, std=1.0, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_alone_is_drawn_as_it_is_in_a_batch(kind, folders):
    model = load(kind, folders[kind])
    both = model.generate(PROMPTS, [11, 12])
    assert both.images.shape == (2, 32, 32, 3) and both.images.dtype == np.uint8 and both.plans == ["", ""]
    for row in range(2):
        alone = model.generate(PROMPTS[row : row + 1], [11 + row]).images[0]
        assert np.abs(alone.astype(int) - both.images[row]).max() <= 1
    other = model.generate(PROMPTS[:1], [13]).images[0]
    assert np.abs(other.astype(int) - both.images[0]).max() > 1
    assert load(kind, folders[kind]).image_size({"path": str(folders[kind])}) == 32


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "sd3_t5"])
def test_drawing_is_the_stock_pipelines_own(kind, folders):
    model, pipe = load(kind, folders[kind]), stock(kind, folders[kind])
    if kind in STOCK:
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    settings = {} if kind in STOCK else {"max_sequence_length": 8}
    drawn = pipe(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        num_inference_steps=3,
        guidance_scale=model.guidance_scale,
        height=32,
        width=32,
        output_type="np",
        **settings,
    ).images
    assert np.array_equal(np.rint(drawn * 255).astype(np.uint8), model.sample(PROMPTS, [1, 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_predict_is_what_the_denoiser_says_inside_the_pipeline(kind, folders):
    """Record one step of the stock pipeline without guidance; the adapter must say the same of the
    same latents."""
    model, pipe, recorded = load(kind, folders[kind]), stock(kind, folders[kind]), {}
    part = getattr(pipe, model.denoiser_name)
    part.register_forward_hook(
        lambda module, args, kwargs, output: recorded.update(call=recorded.get("call", (args, kwargs, output))),
        with_kwargs=True,
    )
    settings = {} if kind in STOCK else {"max_sequence_length": 8}
    pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, height=32, width=32, output_type="latent", **settings)
    args, kwargs, output = recorded["call"]
    latents = args[0] if args else kwargs["hidden_states"]
    t = args[1] if len(args) > 1 else kwargs["timestep"]
    if kind == "sdxl":
        model.size_ids = tuple(kwargs["added_cond_kwargs"]["time_ids"][0].int().tolist())
    text = model.encode_prompts(PROMPTS)
    said = model.predict(latents, t.float().expand(2), text)
    torch.testing.assert_close(said, output[0], atol=1e-5, rtol=1e-4)
    assert said.dtype == torch.float32


def test_noise_is_the_schedulers_for_diffusion_and_a_straight_line_for_flow(folders):
    x0, eps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0.0, 500.9, 999.0])
    model = load("sd15", folders["sd15"])
    scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config)
    torch.testing.assert_close(model.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, torch.tensor([0, 500, 999])))
    assert torch.equal(model.target(x0, eps, t), eps)
    flow = load("sd3", folders["sd3"])
    x_t = flow.add_noise(x0, eps, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], (1 - 0.5009) * x0[1] + 0.5009 * eps[1])
    velocity = flow.target(x0, eps, t)
    torch.testing.assert_close(
        x_t[1] - 0.5009 * velocity[1], x0[1]
    )  # sigma is t / 1000, unshifted: the shift is for drawing alone


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_latents_are_sampled_shifted_and_scaled_and_come_back(kind, folders):
    model = load(kind, folders[kind])
    pixels, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    posterior = model.vae.encode(pixels).latent_dist
    shift = 0.1 if kind == "sd3" else 0.0
    latents = model.encode_images(pixels, noise)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise - shift) * 0.7)
    torch.testing.assert_close(
        model.decode_latents(latents), model.vae.decode(posterior.mean + posterior.std * noise).sample
    )
    assert model.latent_shape == (4, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_a_batch_are_those_of_single_prompts_and_rows_are_picked_whole(kind, folders):
    model = load(kind, folders[kind])
    both = model.encode_prompts(PROMPTS)
    for row in range(2):
        alone = model.encode_prompts(PROMPTS[row : row + 1])
        torch.testing.assert_close(both[row : row + 1].embeds, alone.embeds, atol=1e-5, rtol=1e-4)
        if both.pooled is not None:
            torch.testing.assert_close(both[row : row + 1].pooled, alone.pooled, atol=1e-5, rtol=1e-4)
    assert (both.pooled is None) == (kind == "sd15")
    assert both.embeds.shape[1] == (24 if kind in STOCK else 24 + 8)
    picked = both[torch.tensor([1, 1, 0])]
    assert isinstance(picked, TextEncoding) and len(picked) == 3 and torch.equal(picked.embeds[0], both.embeds[1])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokens_work_in_the_stock_pipeline_and_leave_it_as_it_was(kind, folders, tmp_path):
    model, pipe = load(kind, folders[kind]), stock(kind, folders[kind])
    bank = made_bank(model)
    file = bank.save(tmp_path / "tokens.safetensors", base=str(folders[kind]))

    def draw():
        generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        settings = {} if kind in STOCK else {"max_sequence_length": 8}
        return pipe(
            PROMPTS, generator=generator, num_inference_steps=2, height=32, width=32, output_type="np", **settings
        ).images

    before = draw()
    handle = load_soft_tokens(pipe, file)
    after = draw()
    assert np.abs(after - before).max() > 1e-3
    handle.enable(False)
    assert np.array_equal(draw(), before)
    handle.enable()
    assert np.array_equal(draw(), after)
    with pytest.raises(UserError, match="already"):
        load_soft_tokens(pipe, file)
    handle.remove()
    assert np.array_equal(draw(), before)
    again = load(kind, folders[kind], soft_tokens=str(file))
    assert again.attached.enabled and again.sampling()["soft_tokens"] and model.sampling()["soft_tokens"] is None


def test_tokens_are_read_by_both_halves_of_guidance_or_by_branch(folders):
    """Prompt and empty prompt both read them, as both papers draw; with `null_branch` the first
    half of the rows reads another bank."""
    model, calls = load("sd3", folders["sd3"]), []
    bank = made_bank(model, branches=2)
    handle = model.attach(bank, branch=0, null_branch=1)
    model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["joint_attention_kwargs"]), with_kwargs=True
    )
    model.sample(PROMPTS[:1], [0], num_inference_steps=1)
    (tokens,) = calls[0].values()
    t = torch.tensor([1000.0])
    torch.testing.assert_close(tokens[0], bank(t, 1)[0])
    torch.testing.assert_close(tokens[1], bank(t, 0)[0])
    handle.null_branch = None
    model.sample(PROMPTS[:1], [0], num_inference_steps=1)
    (tokens,) = calls[1].values()
    torch.testing.assert_close(tokens, bank(t, 0).expand(2, -1, -1, -1))


def test_predict_with_tokens_of_its_own_needs_the_hooks_and_wins_over_the_attached_bank(folders):
    model = load("sd3", folders["sd3"])
    x_t, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), model.encode_prompts(PROMPTS)
    bank, other = made_bank(model), SoftTokens(spec_for(model.denoiser, None, 4), std=1.0)
    with pytest.raises(ValueError, match="attach"):
        model.predict(x_t, t, text, bank(t))
    plain = model.predict(x_t, t, text)
    handle = model.attach(other)
    by_hand = model.predict(x_t, t, text, bank(t))
    handle.enable(False)
    assert torch.equal(model.predict(x_t, t, text), plain)
    assert torch.equal(model.predict(x_t, t, text, bank(t)), by_hand)
    assert (by_hand - plain).abs().max() > 1e-4


def test_what_is_wrong_with_a_checkpoint_or_a_request_is_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        SD3(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="there is no such folder"):
        SD3.image_size({"path": str(tmp_path / "nowhere")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load"):
        StableDiffusion(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="dtype"):
        StableDiffusion(str(folders["sd15"]), dtype="int8")
    with pytest.raises(UserError, match="direct"):
        load("sd15", folders["sd15"]).generate(PROMPTS, [1, 2], mode="plan")
