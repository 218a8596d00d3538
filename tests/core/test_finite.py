"""Nothing that is not finite goes further, on any path: it stops in one line, before it is a
picture, a token, a shard or a file."""

import json
from functools import partial
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_weights
from t2i_rl.core.pixels import to_bytes
from t2i_rl.core.prompts import Prompt
from t2i_rl.data.encodings import KINDS, Encodings, finished, write_shard
from t2i_rl.gaussianity.regularizer import Regularizer
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.irg.training import IRG
from t2i_rl.methods.noise.base import Case
from t2i_rl.methods.noise.climb import NoiseOptimization
from t2i_rl.methods.noise.search import NoiseSearch
from t2i_rl.methods.pairs.agsm import AGSM
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.engine.emit import TextEmitter
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.diffusion.flow_edit import flow_edit
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.noise_to_image import noise_to_image
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion
from t2i_rl.pretrain.fit import fit
from t2i_rl.pretrain.vae import VAEStage
from t2i_rl.rewards.self_certainty import SelfCertainty
from t2i_rl.shapes.recognizer import Recognizer
from tests.support.small_diffusers import pipeline, small_vae
from tests.support.tiny import CHAT, load_tiny_janus, save_tiny_janus

NAN, INF = float("nan"), float("inf")
PROMPTS = ["a red circle", "two blue squares"]
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {kind: str(pipeline(kind, root / kind)) for kind in ("sd15", "sd3", "flux")}
    return folders | {"janus": save_tiny_janus(root / "janus")}


def load(kind: str, folders):
    loaders = {
        "sd15": partial(StableDiffusion, steps=1),
        "sd3": partial(SD3, steps=1, max_sequence_length=2),
        "flux": partial(Flux, size=32, max_sequence_length=8),
    }
    return load_tiny_janus(folders[kind]) if kind == "janus" else loaders[kind](folders[kind]).requires_grad_(False)


@torch.no_grad()
def spoil(part: torch.nn.Module, value: float = NAN) -> None:
    """Put one value that is not finite into a module's last matrix."""
    [weight for weight in part.parameters() if weight.ndim > 1][-1].view(-1)[0] = value


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("centred", [False, True])
def test_a_pixel_that_is_not_finite_never_becomes_a_byte(value, centred):
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[1, 2, 0, 0] = value
    with pytest.raises(UserError, match="pixels .* not finite: .*float16"):
        to_bytes(pixels, centred)


def test_finite_pixels_become_the_bytes_that_they_always_were():
    drawn = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn[0, 0, 0, :4] = torch.tensor([0.5 / 255, 1.5 / 255, -0.1, 1.1])
    rows = drawn.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(to_bytes(drawn), np.rint(rows * 255).clip(0, 255).astype(np.uint8))
    centred = drawn * 2 - 1
    by_hand = ((centred + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(to_bytes(centred, centred=True), by_hand)


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_autoencoder_stops_every_way_to_a_picture(kind, value, folders):
    """Infinity as well, which a clamp makes white."""
    model = load(kind, folders)
    spoil(model.vae.decoder, value)
    noise = torch.randn(2, *model.latent_shape)
    with torch.no_grad(), pytest.raises(UserError, match="the pixels that the model drew"):
        noise_to_image(model, noise, model.encode_prompts(PROMPTS), model.empty_text(2))
    with pytest.raises(UserError, match="the pixels that the model drew"):
        model.generate(PROMPTS, [0, 1])


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux"])
def test_a_broken_denoiser_is_told_from_a_broken_autoencoder(kind, folders):
    model = load(kind, folders)
    spoil(model.denoiser)
    with pytest.raises(UserError, match="the latents that the denoiser drew"):
        model.generate(PROMPTS, [0, 1])
    if kind == "sd3":
        x0 = torch.randn(2, *model.latent_shape)
        with pytest.raises(UserError, match="the latents that the denoiser drew"):
            model.decode_latents(flow_edit(model, x0, PROMPTS, PROMPTS, [0, 1], steps=2, start=1))


def test_a_broken_encoder_gives_no_latents_to_train_or_edit(folders):
    model = load("sd3", folders)
    spoil(model.vae.encoder)
    with pytest.raises(UserError, match="latents of these images"):
        model.encode_images(torch.zeros(1, 3, 32, 32), torch.zeros(1, *model.latent_shape))


@pytest.mark.parametrize(
    "part, mode, words",
    [
        ("lm_head", "plan", "logits of the text"),
        ("model.language_model", "plan", "logits of the text"),
        ("model.language_model", "direct", "logits of the image"),
        ("model.generation_head", "direct", "logits of the image"),
        ("model.vqmodel.decoder", "direct", "pixels that the model drew"),
    ],
)
def test_a_nan_in_the_weights_of_an_autoregressive_model_becomes_no_token(part, mode, words, folders):
    model = load("janus", folders)
    spoil(model.model.get_submodule(part))
    for temperature in (1.0, 0.0):  # the sampler would take the last token, the greedy one the NaN's own
        model.temperature = temperature
        with pytest.raises(UserError, match=words):
            model.generate(PROMPTS, [0, 1], mode=mode)


def test_a_row_that_has_ended_is_not_asked_any_more():
    """What comes after a text's end is computed and thrown away: it stops nothing."""
    words = SimpleNamespace(norm=torch.ones(2), text_head=torch.eye(2), text_embed=torch.eye(2))
    emitter = TextEmitter(words, rows=2, count=3, eos=0, temperature=0.0)
    emitter.start(torch.zeros(2, 3))
    for slot, hidden in enumerate(([[1.0, 0.0], [0.0, 1.0]], [[NAN, 0.0], [0.0, 1.0]], [[NAN, 0.0], [NAN, 1.0]])):
        assert emitter.finite.tolist() == [True, True]
        emitter(torch.tensor(hidden), torch.tensor([slot]))
    assert emitter.finite.tolist() == [True, False]
    emitter.start(torch.zeros(2, 3))
    assert emitter.finite.all()


def test_a_picture_is_not_looked_at_through_a_broken_encoder(folders):
    janus = load("janus", folders)
    spoil(janus.model.model.vqmodel.encoder)
    with pytest.raises(UserError, match="encodings of these images"):
        nearest_codes(janus.model.model.vqmodel, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux", "janus"])
def test_a_checkpoint_whose_weights_are_not_finite_does_not_load(kind, folders, tmp_path):
    file = {"janus": "model.safetensors", "sd15": "unet/diffusion_pytorch_model.safetensors"}.get(
        kind, "vae/diffusion_pytorch_model.safetensors"
    )
    source = {"janus": save_tiny_janus}.get(kind, partial(pipeline, kind))
    source(tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / file)
    name = sorted(name for name in weights if weights[name].ndim > 1)[-1]
    weights[name].view(-1)[-1] = INF
    save_file(weights, tmp_path / "copy" / file, {"format": "pt"})
    with pytest.raises(UserError, match="copy holds weights that are not finite"):
        Janus(str(tmp_path / "copy"), CHAT) if kind == "janus" else load(kind, {kind: str(tmp_path / "copy")})


def test_large_finite_weights_are_let_through():
    """Their sum overflows, and they do not."""
    check_weights([("wide", torch.full((4,), 3e38)), ("half", torch.full((4096,), 6e4, dtype=torch.float16))], "this")
    with pytest.raises(UserError, match="the first is two"):
        check_weights([("one", torch.ones(3)), ("two", torch.tensor([1.0, NAN])), ("three", torch.tensor(NAN))], "this")


def test_a_recogniser_whose_weights_are_not_finite_does_not_load(tmp_path):
    recognizer = Recognizer(width=16)
    spoil(recognizer)
    (tmp_path / "config.json").write_text(json.dumps({"width": 16}))
    (tmp_path / "model.safetensors").write_bytes(save(recognizer.state_dict()))
    with pytest.raises(UserError, match="not finite"):
        Recognizer.load(tmp_path)


def methods(folders) -> list[L.LightningModule]:
    """One of each kind that keeps checkpoints, with the average of those that keep one."""
    methods = [
        AGSM(load("sd3", folders), SGD),
        GRPO(load("janus", folders), SelfCertainty(), SGD, max_grad_norm=None),
        IRG(load("janus", folders), Rounds(), SGD),
    ]
    for method in methods:
        method._trainer = SimpleNamespace(is_global_zero=True, global_step=0)
    return methods


def saved(method) -> dict:
    checkpoint = {"state_dict": {name: value.clone() for name, value in method.state_dict().items()}}
    method.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_training_checkpoint_that_is_not_finite_is_neither_saved_nor_loaded(folders):
    for method in methods(folders):
        checkpoint = saved(method)
        method.on_load_checkpoint(checkpoint)
        next(iter(checkpoint["state_dict"].values())).view(-1)[0] = NAN
        with pytest.raises(UserError, match="this checkpoint holds weights that are not finite"):
            method.on_load_checkpoint(checkpoint)
        with torch.no_grad():
            next(weight for weight in method.parameters() if weight.requires_grad).view(-1)[0] = INF
        with pytest.raises(UserError, match="would be saved .* lower method.optimizer.lr"):
            saved(method)


def test_an_average_that_is_not_finite_is_not_saved_either(folders):
    agsm, _, irg = methods(folders)
    spoil(agsm.average)
    irg.average = {"weight": torch.tensor([NAN])}
    for method in (agsm, irg):
        with pytest.raises(UserError, match="not finite"):
            saved(method)


def test_encodings_that_are_not_finite_are_not_written(tmp_path):
    rows = {"mean": torch.zeros(3, 4, 2, 2), "std": torch.ones(3, 4, 2, 2)}
    rows["std"][1, 0, 0, 0] = NAN
    with pytest.raises(UserError, match=r"the std of 'b' \(images\) is not finite"):
        write_shard(tmp_path, "images", 0, ["a", "b", "c"], rows)
    rows["std"][1, 0, 0, 0] = 3.4e38  # which bfloat16 rounds to infinity
    with pytest.raises(UserError, match="not finite"):
        write_shard(tmp_path, "images", 0, ["a", "b", "c"], rows)
    assert not list(tmp_path.iterdir())


def test_encodings_of_an_earlier_version_are_made_anew_and_never_read(tmp_path, monkeypatch):
    keys, rows = {"images": ["a", "b"], "texts": ["x"]}, {"images": {"mean": torch.full((2, 4), NAN)}}
    rows["texts"] = {"embeds": torch.ones(1, 3)}
    with monkeypatch.context() as before:
        before.setattr(torch, "isfinite", lambda part: torch.ones_like(part, dtype=torch.bool))
        for kind in KINDS:
            write_shard(tmp_path, kind, 0, keys[kind], rows[kind])
    assert finished(tmp_path, "texts", 0, ["x"]) and finished(tmp_path, "images", 0, ["a", "b"]) is None
    about = {"format": "t2i_rl.encodings.1", "images": 2, "texts": 1}
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="mean of images are not finite: encode this data set again"):
        Encodings.open(str(tmp_path)).pairs([0], ["a"], ["x"])


class Steep(torch.autograd.Function):
    """The same value, at a slope of one's own."""

    @staticmethod
    def forward(ctx, value, slope):
        ctx.slope = slope
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope, None


class Bright(Reward):
    """How bright a picture is, with a gradient as steep as it is asked to be."""

    differentiable = True

    def __init__(self, slope: float = 1.0):
        self.slope = slope

    def score_pixels(self, pixels, prompts):
        return Steep.apply(pixels.mean(dim=(1, 2, 3)), self.slope)


def search(kind: type, model, tmp_path, reward=None, **settings):
    cases = [Case(0, Prompt("p", PROMPTS[0], "", {}), 0, 7)]
    method = kind(model, reward or Bright(), {}, folder=tmp_path, **settings)
    method.texts = {PROMPTS[0]: model.encode_prompts(PROMPTS[:1])}
    return method.search(cases)


def test_looking_for_noise_stops_where_anything_is_not_finite(folders, tmp_path):
    model = load("flux", folders)
    climbing = {"regularizer": Regularizer({}), "iterations": 2, "max_grad_norm": None}
    with pytest.raises(UserError, match="the gradient of case 0"):
        search(NoiseOptimization, model, tmp_path, Bright(INF), optimizer=SGD, **climbing)
    far = partial(torch.optim.SGD, lr=1e38)
    with pytest.raises(UserError, match="the noise of 'a red circle' is not finite after step 0"):
        search(NoiseOptimization, model, tmp_path, Bright(1e5), optimizer=far, **climbing)
    assert len(search(NoiseOptimization, model, tmp_path, optimizer=SGD, **climbing)[0].rows) == 3
    spoil(model.vae.decoder)
    with pytest.raises(UserError, match="pixels that the model drew"):
        search(NoiseSearch, model, tmp_path, evaluations=2)


def test_a_penalty_that_is_not_finite_is_not_written_down(folders, tmp_path):
    method = NoiseSearch(load("flux", folders), Bright(), {}, folder=tmp_path)
    pixels, one = torch.zeros(1, 3, 32, 32), torch.zeros(1)
    with pytest.raises(UserError, match="penalty at step 3 are not finite"):
        method.note([None], 3, torch.zeros(1, 4, 8, 8), pixels, one, penalty=one + NAN)


class Stream(torch.utils.data.IterableDataset):
    """Pictures of noise; from the third batch on, none."""

    def __init__(self, first: int, broken: bool):
        self.first, self.broken = first, broken

    def __iter__(self):
        for number in range(self.first, 9):
            draws = torch.Generator().manual_seed(number)
            pixels = torch.rand(2, 3, 32, 32, generator=draws)
            yield pixels * NAN if self.broken and number >= 2 else pixels


def test_a_stage_of_pretraining_stops_at_a_gradient_that_is_not_finite(tmp_path):
    """Lightning clips a NaN to NaN, steps, and goes on to the end otherwise."""
    stage = VAEStage(small_vae())
    with pytest.raises(UserError, match="gradient norm is nan at step 2: lower this stage's learning rates"):
        fit(stage, partial(Stream, broken=True), 4, tmp_path / "vae", "32-true")
    check_weights(stage.named_parameters(), "the stage that stopped")
    assert not (tmp_path / "vae" / "last.ckpt").exists()


def test_a_stage_whose_last_step_broke_its_weights_is_not_saved_and_not_taken_up(tmp_path):
    stage = VAEStage(small_vae())
    stage.on_train_end = lambda: spoil(stage.vae)
    with pytest.raises(UserError, match="stage vae holds weights that are not finite"):
        fit(stage, partial(Stream, broken=False), 1, tmp_path / "vae", "32-true")
    spoil(stage.vae)
    state = {"state_dict": stage.state_dict(), "global_step": 1}
    torch.save(state, tmp_path / "vae" / "last.ckpt")
    with pytest.raises(UserError, match="delete .*vae, to train this stage again"):
        fit(stage, partial(Stream, broken=False), 1, tmp_path / "vae", "32-true")
