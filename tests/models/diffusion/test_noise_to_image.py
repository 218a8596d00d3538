"""From noise to image with gradients: equal to the stock pipelines' own body, and its gradients to
finite differences."""

import numpy as np
import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.noise_to_image import noise_to_image
from t2i_rl.models.diffusion.sana import SanaSprint
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from tests.support.small_diffusers import pipeline

PROMPTS = ["a red circle", "two blue squares"]
MODELS = {
    "flux": lambda folder, **more: Flux(str(folder), size=32, max_sequence_length=16, **more),
    "sd35": lambda folder, **more: SD3(str(folder), guidance_scale=0.0, steps=1, max_sequence_length=16, **more),
    "sd_turbo": lambda folder, **more: StableDiffusion(
        str(folder), guidance_scale=0.0, steps=1, scheduler="own", **more
    ),
    "sdxl_turbo": lambda folder, **more: StableDiffusionXL(
        str(folder), guidance_scale=0.0, steps=1, scheduler="own", **more
    ),
    "sana": lambda folder, **more: SanaSprint(
        str(folder), size=32, max_sequence_length=16, **({"dtype": "float32"} | more)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    model = MODELS[request.param](pipeline(request.param, tmp_path_factory.mktemp(request.param)))
    return model.requires_grad_(False).eval()


def stock(model, noise: torch.Tensor, **settings) -> torch.Tensor:
    """The stock pipeline's own body, with gradients: its `no_grad` decorator peeled off."""
    latents = noise
    if isinstance(model, Flux):
        latents = model.pipe._pack_latents(noise, *noise.shape)
    body = type(model.pipe).__call__.__wrapped__
    chosen = (
        {"guidance_scale": model.guidance_scale, "num_inference_steps": model.steps} | model.call_settings() | settings
    )
    return body(
        model.pipe,
        prompt=PROMPTS,
        latents=latents,
        height=model.size,
        width=model.size,
        output_type="pt",
        return_dict=False,
        **chosen,
    )[0]


def noise_for(model, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def test_equals_the_stock_pipeline(model):
    noise = noise_for(model)
    with torch.no_grad():
        ours = noise_to_image(model, noise, model.encode_prompts(PROMPTS))
        theirs = stock(model, noise)
    assert ours.shape == (2, 3, model.size, model.size) and ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_gradients_are_the_stock_body_s_and_reach_every_value(model):
    noise = noise_for(model).requires_grad_()
    weights = torch.rand(3, model.size, model.size, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((noise_to_image(model, noise, model.encode_prompts(PROMPTS)) * weights).sum(), noise)
    (theirs,) = torch.autograd.grad((stock(model, noise) * weights).sum(), noise)
    if isinstance(
        model, SanaSprint
    ):  # its linear attention divides by sums that nearly cancel: single values round far
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert (ours != 0).float().mean() > 0.99


def test_gradients_are_those_of_finite_differences(model):
    text = model.encode_prompts(PROMPTS)
    noise, step = noise_for(model), 1e-3
    weights = torch.rand(3, model.size, model.size, generator=torch.Generator().manual_seed(1))

    def value(x: torch.Tensor) -> torch.Tensor:
        return (noise_to_image(model, x, text) * weights).double().sum()

    leaf = noise.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(noise + step * direction) - value(noise - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_checkpointing_changes_nothing(model):
    text, noise = model.encode_prompts(PROMPTS), noise_for(model).requires_grad_()
    results = {}
    for checkpointing in (False, True):
        image = noise_to_image(model, noise, text, checkpointing=checkpointing)
        results[checkpointing] = (image.detach(), *torch.autograd.grad(image.square().sum(), noise))
    for plain, checkpointing in zip(results[False], results[True], strict=True):
        torch.testing.assert_close(plain, checkpointing)


def test_rows_do_not_meet(model):
    text, noise = model.encode_prompts(PROMPTS), noise_for(model)
    with torch.no_grad():
        together = noise_to_image(model, noise, text)
        alone = torch.cat([noise_to_image(model, noise[i : i + 1], text[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_noise_in_half_precision_is_refused_and_a_half_model_gives_float_gradients(tmp_path):
    model = MODELS["flux"](pipeline("flux", tmp_path), dtype="bfloat16").requires_grad_(False)
    text, noise = model.encode_prompts(PROMPTS), noise_for(model)
    with pytest.raises(ValueError, match="float32"):
        noise_to_image(model, noise.bfloat16(), text)
    noise.requires_grad_()
    (gradient,) = torch.autograd.grad(noise_to_image(model, noise, text).sum(), noise)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_many_steps_with_guidance_equal_the_stock_pipeline(kind, tmp_path):
    classes = {"sd15": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": SD3}
    more = {"max_sequence_length": 16} if kind == "sd3" else {}
    model = classes[kind](str(pipeline(kind, tmp_path)), guidance_scale=3.0, steps=3, **more).requires_grad_(False)
    noise = noise_for(model)
    with torch.no_grad():
        ours = noise_to_image(model, noise, model.encode_prompts(PROMPTS), model.empty_text(2))
        theirs = stock(model, noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_noise_of_every_step_is_searched_where_ddim_adds_some(tmp_path):
    """eta = 1: equal to the stock pipeline when its generator draws the same noise, and every
    step's noise has a gradient."""
    model = StableDiffusion(str(pipeline("sd15", tmp_path)), guidance_scale=3.0, steps=3).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    first, later = noise_for(model), [torch.randn(2, *model.latent_shape, generator=generator) for _ in range(3)]
    noise = torch.stack([first, *later], dim=1).requires_grad_()
    image = noise_to_image(model, noise, model.encode_prompts(PROMPTS), model.empty_text(2), eta=1.0)
    with torch.no_grad():
        theirs = stock(model, first, eta=1.0, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(image.detach(), theirs, rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(image.sum(), noise)
    assert (gradient[:, :3].abs().sum(dim=(0, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize("last_step_noise", [True, False])
def test_ddims_last_step_adds_its_noise_or_none(tmp_path, last_step_noise):
    """Against DDIM written out in float64 from its equations (arXiv 2010.02502 eq. 12, 16), eta 1,
    with a denoiser that is a formula."""
    model = StableDiffusion(str(pipeline("sd15", tmp_path)), guidance_scale=1.0, steps=4).requires_grad_(False)
    model.pipe.scheduler.register_to_config(
        set_alpha_to_one=False
    )  # as SD1.5 has it: something is left to do in the last step
    scheduler, draws = model.scheduled(4), torch.Generator().manual_seed(0)
    noise = torch.randn(2, 5, 4, 3, 3, generator=draws, dtype=torch.float64)

    def denoise(x, t):
        return 0.3 * x + 0.1 * torch.sin(x) + t.view(-1, 1, 1, 1) / 5000

    alphas, gap = scheduler.alphas_cumprod.double(), scheduler.config.num_train_timesteps // 4
    x = noise[:, 0]
    for step, t in enumerate(scheduler.timesteps.tolist()):
        a, before = alphas[t], alphas[t - gap] if t >= gap else scheduler.final_alpha_cumprod.double()
        eps = denoise(x, torch.full((2,), t))
        start = (x - (1 - a).sqrt() * eps) / a.sqrt()
        sigma = ((1 - before) / (1 - a) * (1 - a / before)).sqrt() if last_step_noise or step < 3 else torch.zeros(())
        x = before.sqrt() * start + (1 - before - sigma**2).sqrt() * eps + sigma * noise[:, step + 1]
    asked = noise.float().requires_grad_()
    latents = model.noise_to_latents(asked, denoise, 4, eta=1.0, last_step_noise=last_step_noise)
    torch.testing.assert_close(latents.double(), x, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(latents.sum(), asked)
    assert (gradient.abs().sum(dim=(0, 2, 3, 4)) > 0).tolist() == [True] * 4 + [last_step_noise]


def test_packing_of_flux_is_a_round_trip_and_reshaping_is_not_the_same(tmp_path):
    model = MODELS["flux"](pipeline("flux", tmp_path))
    noise = noise_for(model)
    packed = model.pipe._pack_latents(noise, *noise.shape)
    assert torch.equal(model.pipe._unpack_latents(packed, model.size, model.size, model.pipe.vae_scale_factor), noise)
    assert not torch.equal(noise.reshape(packed.shape), packed)


def test_drawing_by_the_pipeline_and_through_noise_agree(tmp_path):
    """`sample` and `noise_to_image` are one model: the seed's own noise gives the seed's own
    picture."""
    model = MODELS["flux"](pipeline("flux", tmp_path)).requires_grad_(False)
    noise = torch.stack(
        [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5)]
    )
    with torch.no_grad():
        ours = noise_to_image(model, noise, model.encode_prompts(PROMPTS))
    drawn = model.sample(PROMPTS, [4, 5])
    assert np.abs((ours * 255).round().permute(0, 2, 3, 1).numpy() - drawn).max() <= 1


def test_text_encoders_can_be_dropped_once_texts_are_known(tmp_path):
    model = MODELS["flux"](pipeline("flux", tmp_path)).requires_grad_(False)
    text, noise = model.encode_prompts(PROMPTS), noise_for(model)
    with torch.no_grad():
        before = noise_to_image(model, noise, text)
        model.free_text_encoders()
        assert len(model.text_encoders) == 0 and model.pipe.text_encoder is None and model.pipe.text_encoder_2 is None
        assert torch.equal(noise_to_image(model, noise, text), before)


def test_sana_refuses_gradients_through_its_own_noise(tmp_path):
    model = MODELS["sana"](pipeline("sana", tmp_path), steps=2)
    with pytest.raises(UserError, match="steps=1"):
        noise_to_image(model, noise_for(model), model.encode_prompts(PROMPTS))


def test_an_unknown_scheduler_is_refused(tmp_path):
    with pytest.raises(UserError, match="ddim or own"):
        StableDiffusion(str(pipeline("sd15", tmp_path)), scheduler="euler")
