"""Soft tokens with a branch of their own for guidance's empty prompt: who reads them, and who is
refused because nobody can tell."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from t2i_rl.core.errors import UserError
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.noise_to_image import noise_to_image
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.soft_tokens import Attached, SoftTokens, load_soft_tokens, spec_for
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion, StableDiffusionXL
from tests.support.small_diffusers import denoiser, inputs, pipeline

LOADERS = {
    "sd15": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "sd3": lambda folder, **more: SD3(folder, max_sequence_length=8, **more),
    "sd35": lambda folder, **more: SD3(folder, max_sequence_length=8, **more),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: str(pipeline(kind, root / kind)) for kind in (*LOADERS, "sdxl_turbo", "flux")}


def with_tokens(kind: str, folder: str, **settings):
    """A small model with two branches at work, the second for the empty prompt: as AGSM released
    for SDXL has it."""
    model = LOADERS[kind](folder, **{"guidance_scale": 5.0, "steps": 3, **settings}).requires_grad_(False)
    model.attach(bank_of(model.denoiser), branch=0, null_branch=1)
    return model


def bank_of(part: torch.nn.Module) -> SoftTokens:
    spec = spec_for(part, None, 4, branches=2)
    return SoftTokens(spec, std=1.0, generator=torch.Generator().manual_seed(3)).requires_grad_(False)


def through_noise(model, noise: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return noise_to_image(model, noise, model.encode_prompts(prompts), model.empty_text(len(prompts)))


def stock(model, noise: torch.Tensor, prompts: list[str], **settings) -> torch.Tensor:
    chosen = {"guidance_scale": model.guidance_scale, "num_inference_steps": model.steps} | model.call_settings()
    return model.pipe(
        prompts, latents=noise, height=32, width=32, output_type="pt", return_dict=False, **(chosen | settings)
    )[0]


def noise_for(model, rows: int, alike: bool = False) -> torch.Tensor:
    noise = torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return noise[:1].repeat(rows, 1, 1, 1) if alike else noise


@pytest.mark.parametrize("kind, rows", [("sdxl", 1), ("sdxl", 2), ("sdxl", 3), ("sd15", 2), ("sd3", 2)])
def test_through_noise_the_prompts_read_their_branch_as_in_the_stock_pipeline(kind, rows, folders):
    model, prompts = with_tokens(kind, folders[kind]), ["a red circle", "two blue squares", "a cross"][:rows]
    noise = noise_for(model, rows)
    with torch.no_grad():
        ours = through_noise(model, noise, prompts)
        torch.testing.assert_close(ours, stock(model, noise, prompts), rtol=0, atol=1e-4)
        model.attached.null_branch = None
        assert (through_noise(model, noise, prompts) - ours).abs().max() > 1e-3  # the branch is read at all


@pytest.mark.parametrize("rows", [2, 3])
def test_pictures_of_one_prompt_and_one_noise_are_alike(rows, folders):
    model = with_tokens("sdxl", folders["sdxl"])
    with torch.no_grad():
        pictures = through_noise(model, noise_for(model, rows, alike=True), ["a red circle"] * rows)
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=0, atol=1e-4)


def test_without_guidance_every_picture_reads_the_prompts_branch(folders):
    settings = {"guidance_scale": 0.0, "steps": 1, "scheduler": "own"}
    model = StableDiffusionXL(folders["sdxl_turbo"], **settings).requires_grad_(False)
    handle = model.attach(bank_of(model.denoiser), branch=0, null_branch=1)
    noise, prompts = noise_for(model, 2, alike=True), ["a red circle"] * 2
    with torch.no_grad():
        drawn = noise_to_image(model, noise, model.encode_prompts(prompts))
        by_stock = stock(model, noise, prompts)
        handle.null_branch = None
        positive = noise_to_image(model, noise, model.encode_prompts(prompts))
    assert torch.equal(drawn, positive)
    torch.testing.assert_close(by_stock, positive, rtol=0, atol=1e-4)


def branches_read(model, draw) -> list[list[int]]:
    """Which branch each row of each of the denoiser's calls read while `draw` ran."""
    calls, look = [], lambda module, args, kwargs: calls.append(kwargs[model.attached.splice.carrier])
    hook = model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    draw()
    hook.remove()
    bank, read = model.attached.bank, []
    for carried in calls:
        (tokens,) = carried.values()
        offsets = tokens - bank.tokens[0]
        spread = [
            float(offsets[row].std(dim=1).max()) for row in range(len(tokens))
        ]  # one offset by time for all of a bank
        read.append([int(value > 1e-4) for value in spread])
    return read


def test_several_pictures_a_prompt_and_guidance_off_half_way_are_told_apart(folders):
    model = with_tokens("sdxl", folders["sdxl"])

    def off_after_the_first(pipe, step, t, tensors):
        if step > 0:
            return tensors
        pipe._guidance_scale = 0.0
        return {name: value.chunk(2)[1] for name, value in tensors.items()}

    several = branches_read(model, lambda: stock(model, None, ["a cross", "a circle"], num_images_per_prompt=2))
    assert several == [[1, 1, 1, 1, 0, 0, 0, 0]] * 3
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    more = {"callback_on_step_end": off_after_the_first, "callback_on_step_end_tensor_inputs": names}
    switched = branches_read(model, lambda: stock(model, None, ["a cross", "a circle"], **more))
    assert switched == [[1, 1, 0, 0], [0, 0], [0, 0]]


def test_the_pass_of_sd35_that_skips_layers_is_of_prompts(folders):
    model = with_tokens("sd35", folders["sd35"], steps=4)
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    read = branches_read(model, lambda: stock(model, noise_for(model, 2, alike=True), ["a cross", "a circle"], **more))
    assert [1, 1, 0, 0] in read and [0, 0] in read and len(read) > 4
    assert {tuple(rows) for rows in read} == {(1, 1, 0, 0), (0, 0)}


def test_who_does_not_say_which_rows_are_empty_is_refused(folders):
    model = with_tokens("sdxl", folders["sdxl"])
    latents, text = noise_for(model, 2), model.encode_prompts(["a cross", "a circle"])
    with pytest.raises(UserError, match="empty=False"):
        model.predict(latents, torch.tensor([500.0, 500.0]), text)
    said = model.predict(latents, torch.tensor([500.0, 500.0]), text, empty=torch.tensor([True, False]))
    apart = [model.predict(latents, torch.tensor([500.0, 500.0]), text, empty=empty) for empty in (True, False)]
    torch.testing.assert_close(said, torch.stack([apart[0][0], apart[1][1]]), atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # after which the pipeline still says that guidance is on
        stock(model, None, ["a cross"])
    batch = inputs("sdxl", 2) | {"sample": latents, "encoder_hidden_states": text.embeds}
    batch["added_cond_kwargs"]["text_embeds"] = text.pooled
    with pytest.raises(UserError, match="no two halves"):
        model.denoiser(**batch)
    part = denoiser("sd3")
    for rows in (2, 3):  # a denoiser called by itself
        with Attached(part, bank_of(part), null_branch=1), pytest.raises(UserError, match="does not say"):
            part(**inputs("sd3", rows))
    with Attached(part, bank_of(part), branch=1, null_branch=1):  # the prompts' own branch needs no telling
        part(**inputs("sd3"))


def test_a_pipeline_that_draws_prompts_and_empty_ones_apart_is_refused(folders, tmp_path):
    model = Flux(folders["flux"], size=32, max_sequence_length=16, guidance_scale=3.5)
    file = bank_of(model.denoiser).save(tmp_path / "tokens.safetensors", null_branch="1")
    handle = load_soft_tokens(model.pipe, file)
    with pytest.raises(UserError, match="null_branch=0"):
        model.pipe("a cross", height=32, width=32, num_inference_steps=1, max_sequence_length=16)
    handle.remove()
    model.attach(SoftTokens.load(file))
    with pytest.raises(UserError, match="never asks"):
        model.sample(["a cross", "a circle"], [0, 1])


@pytest.mark.parametrize("wrong", ["3", "2", "-1", "1.0", "one", ""])
def test_a_file_whose_null_branch_is_none_of_its_branches_is_refused_when_it_loads(wrong, tmp_path):
    file = bank_of(denoiser("sd3")).save(tmp_path / "tokens.safetensors", null_branch=wrong)
    with pytest.raises(UserError, match="none of its 2 branches"):
        SoftTokens.load(file)


def test_a_branch_that_is_not_there_is_refused_wherever_it_comes_from():
    part = denoiser("sd3")
    bank = bank_of(part)
    for branch, null_branch in ((2, None), (-1, None), (0.5, None), (0, 2), (0, -1)):
        with pytest.raises(UserError, match="there is no branch"):
            Attached(part, bank, branch, null_branch)
    bank.null_branch = 3
    with pytest.raises(UserError, match="there is no branch 3"):
        Attached(part, bank)


def test_a_file_whose_tensors_do_not_fit_its_spec_or_are_not_finite_is_refused(tmp_path):
    file = bank_of(denoiser("sd3")).save(tmp_path / "tokens.safetensors")
    with safe_open(file, "pt") as whole:
        about, tensors = whole.metadata(), {name: whole.get_tensor(name) for name in ("tokens", "time")}
    broken = tensors | {"tokens": torch.full_like(tensors["tokens"], torch.nan)}
    for wrong, facts, words in (
        ({"tokens": tensors["tokens"]}, about, "do not fit"),
        (tensors | {"tokens": tensors["tokens"][:1]}, about, "do not fit"),
        (tensors, about | {"spec": "{}"}, "do not fit"),
        (tensors, about | {"spec": "no json"}, "do not fit"),
        (broken, about, "not finite"),
    ):
        save_file({name: part.contiguous() for name, part in wrong.items()}, file, facts)
        with pytest.raises(UserError, match=words):
            SoftTokens.load(file)
    bank = bank_of(denoiser("sd3"))
    bank.tokens[0, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        bank.save(tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()


def test_drawing_by_the_pipeline_and_through_noise_agree_with_tokens_of_two_branches(folders):
    model = with_tokens("sd15", folders["sd15"])
    seeds, prompts = [4, 5], ["a cross", "two blue squares"]
    noise = torch.stack(
        [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    with torch.no_grad():
        ours = (through_noise(model, noise, prompts) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - model.sample(prompts, seeds)).max() <= 1
