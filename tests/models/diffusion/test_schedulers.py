"""What a checkpoint's scheduler says it was trained to: its own target for each kind, and a refusal
of whatever is none of them."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from t2i_rl.core.errors import UserError
from t2i_rl.data.pairs import ShapesStream
from t2i_rl.methods.pairs.denoising import Denoising
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.noise_to_image import noise_to_image
from t2i_rl.models.diffusion.sana import SanaSprint
from t2i_rl.models.diffusion.schedulers import check_diffusion, ddim, read_scheduler
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from tests.support.small_diffusers import pipeline

ALL_TIMES = torch.arange(0, 1000, 37)


def with_scheduler(kind: str, folder: Path, index: str | None = None, **settings) -> str:
    """A small checkpoint whose scheduler's file says something else."""
    pipeline(kind, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if index is not None:
        names = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(names | {"scheduler": ["diffusers", index]}))
    return str(folder)


def closed_form(kind: str, betas: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The target out of the betas, in float64, by the angle between picture and noise rather than
    by cumulated alphas."""
    cosine = torch.exp(0.5 * torch.log1p(-betas.double()).cumsum(0))[t]
    angle = torch.acos(cosine).view(-1, 1, 1, 1)
    turned = torch.cos(angle) * eps - torch.sin(angle) * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": turned}[kind]


@pytest.mark.parametrize("drawn_by", ["ddim", "own"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_unet_is_trained_to_what_its_scheduler_says_that_it_predicts(kind, drawn_by, tmp_path):
    model = StableDiffusion(with_scheduler("sd15", tmp_path, prediction_type=kind), scheduler=drawn_by)
    x0, eps = torch.randn(2, len(ALL_TIMES), *model.latent_shape, dtype=torch.float64)
    scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config)
    target = model.target(x0, eps, ALL_TIMES.float() + 0.5)
    by_angle = closed_form(kind, scheduler.betas, x0, eps, ALL_TIMES)
    torch.testing.assert_close(target, by_angle, atol=1e-4, rtol=1e-4)  # the alphas are float32
    if kind == "v_prediction":
        torch.testing.assert_close(target, scheduler.get_velocity(x0, eps, ALL_TIMES), atol=1e-6, rtol=1e-6)
        assert (target - eps).abs().max() > 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_the_sampler_takes_the_prediction_for(kind, tmp_path):
    """A denoiser that says the target exactly is drawn back to its picture in one step, whatever
    the parametrisation."""
    model = StableDiffusion(with_scheduler("sd15", tmp_path, prediction_type=kind), steps=1)
    x0, eps, t = *torch.randn(2, 2, *model.latent_shape), torch.full((2,), 600.0)
    scheduler, x_t = model.scheduled(10), model.add_noise(x0, eps, t)
    drawn = scheduler.step(model.target(x0, eps, t), 600, x_t)
    torch.testing.assert_close(drawn.pred_original_sample, x0, atol=1e-4, rtol=1e-3)


def test_zero_terminal_snr_is_trained_under_its_own_betas(tmp_path):
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    model = StableDiffusion(with_scheduler("sd15", tmp_path, **settings), steps=2)
    x0, eps, last = *torch.randn(2, 2, *model.latent_shape), torch.full((2,), 999.0)
    torch.testing.assert_close(model.add_noise(x0, eps, last), eps)  # pure noise
    torch.testing.assert_close(model.target(x0, eps, last), -x0)
    with torch.no_grad():
        drawn = noise_to_image(model, eps, model.encode_prompts(["a cross"] * 2), model.empty_text(2))
    assert torch.isfinite(drawn).all()


def test_a_step_of_training_goes_towards_the_velocity(tmp_path):
    """The loss that a method logs is the error to the target of the checkpoint's own kind."""
    losses = {}
    for kind in ("epsilon", "v_prediction"):
        model = StableDiffusion(with_scheduler("sd15", tmp_path / kind, prediction_type=kind))
        method = Denoising(model, partial(torch.optim.SGD, lr=0.0))
        grid = method.grid(next(iter(ShapesStream(4, {"colors": 1.0}, 0, 0))))
        rows = torch.arange(4)
        with torch.no_grad():
            predicted = method.predict(grid, method.emit(method.bank, grid.t), rows, rows)
        errors = (predicted - grid.target).square().mean(dim=(1, 2, 3))
        logged = method.accumulate(grid, method.emit(method.bank, grid.t).detach().requires_grad_())["train/loss"]
        losses[kind] = float(errors.mean())
        assert logged == pytest.approx(losses[kind], rel=1e-4)
    assert abs(losses["epsilon"] - losses["v_prediction"]) > 1e-2


REFUSED = {
    "an unknown parametrisation": ({"prediction_type": "x0"}, "prediction_type='x0'"),
    "flow matching in a UNet": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
    "flow sigmas": ({"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "flow_prediction"),
    "EDM": ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler"),
    "EDM's data deviation": ({"sigma_data": 0.5}, "EDM"),
    "continuous times": ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, "EDM"),
    "another number of times": ({"num_train_timesteps": 500}, "num_train_timesteps=500"),
    "other betas": ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
    "a learned variance": ({"variance_type": "learned_range"}, "learned_range"),
    "zero SNR under a prediction of the noise": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_process_is_refused_before_weights_load(what, tmp_path):
    settings, words = REFUSED[what]
    folder = with_scheduler("sd15", tmp_path, **settings)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.write_bytes(b"none")  # whoever reads weights fails otherwise
    with pytest.raises(UserError, match=words):
        StableDiffusion(folder)
    with pytest.raises(UserError, match=words):
        StableDiffusion.image_size({"path": folder})


def test_the_scheduler_that_the_index_loads_counts_as_well_as_its_file(tmp_path):
    folder = with_scheduler("sd15", tmp_path, index="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler"):
        StableDiffusion(folder)


@pytest.mark.parametrize(
    "kind, load, settings, words",
    [
        ("sd3", partial(SD3, max_sequence_length=2), {"_class_name": "EulerDiscreteScheduler"}, "EulerDiscrete"),
        ("sd3", partial(SD3, max_sequence_length=2), {"prediction_type": "epsilon"}, "prediction_type"),
        ("sd3", partial(SD3, max_sequence_length=2), {"stochastic_sampling": True}, "stochastic_sampling"),
        ("sd3", partial(SD3, max_sequence_length=2), {"num_train_timesteps": 100}, "num_train_timesteps"),
        ("flux", partial(Flux, size=32), {"invert_sigmas": True}, "invert_sigmas"),
        ("flux", partial(Flux, size=32), {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ("sana", partial(SanaSprint, size=32), {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "SANA"),
        ("sana", partial(SanaSprint, size=32), {"prediction_type": "epsilon"}, "TrigFlow"),
    ],
)
def test_a_transformer_with_another_convention_is_refused(kind, load, settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load(with_scheduler(kind, tmp_path, **settings))


def test_latents_normalised_by_channel_are_refused(tmp_path):
    folder = with_scheduler("sdxl", tmp_path)
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4}))
    with pytest.raises(UserError, match="latents_mean"):
        StableDiffusionXL(folder)
    with pytest.raises(UserError, match="latents_mean"):
        StableDiffusionXL(str(pipeline("sdxl", tmp_path / "other")), vae=str(tmp_path / "vae"))


def test_an_ancestral_sampler_of_pictures_is_refused_and_ddim_draws_them(tmp_path):
    folder = with_scheduler("sdxl_turbo", tmp_path, prediction_type="sample")
    with pytest.raises(UserError, match="model.scheduler=ddim"):
        StableDiffusionXL(folder, scheduler="own")
    check_diffusion(folder, read_scheduler(folder), "ddim")


def test_ddim_in_the_place_of_another_clips_no_latents_and_keeps_what_was_said():
    checkpoints_own = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        use_karras_sigmas=True,
    )
    sampler = ddim(checkpoints_own)
    assert not sampler.config.clip_sample and sampler.config.prediction_type == "v_prediction"
    assert sampler.config.timestep_spacing == "trailing"
    torch.testing.assert_close(sampler.alphas_cumprod, checkpoints_own.alphas_cumprod)
    assert ddim(DDIMScheduler(clip_sample=True)).config.clip_sample  # who says so is taken at his word


def test_times_between_whole_ones_reach_the_unet_as_the_stock_pipeline_gives_them(tmp_path):
    folder = with_scheduler("sd_turbo", tmp_path, timestep_spacing="linspace", use_karras_sigmas=True)
    model = StableDiffusion(folder, scheduler="own", guidance_scale=0.0, steps=3)
    noise, prompts = torch.randn(2, *model.latent_shape), ["a cross", "a circle"]
    times = []
    model.denoiser.register_forward_pre_hook(lambda module, args: times.append(args[1].reshape(-1)[0].item()))
    with torch.no_grad():
        ours = noise_to_image(model, noise, model.encode_prompts(prompts))
        theirs = model.pipe(
            prompts,
            latents=noise,
            guidance_scale=0.0,
            num_inference_steps=3,
            height=32,
            width=32,
            output_type="pt",
        ).images
    assert times[:3] == times[3:] and any(t % 1 for t in times)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
