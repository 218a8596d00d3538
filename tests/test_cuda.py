"""What runs on a GPU, on the CPU as well where both can: decoding, CUDA graphs, two steps of every kind of method,
resuming. `pytest -m cuda` takes the GPU's alone."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import t2i_rl
from t2i_rl.callbacks.rng_state import RNGState, generators, set_generators
from t2i_rl.core.prompts import Prompt
from t2i_rl.data.pairs import ShapesStream
from t2i_rl.gaussianity.moments import Moment
from t2i_rl.gaussianity.regularizer import Regularizer
from t2i_rl.gaussianity.spectrum import Spectrum
from t2i_rl.methods.noise.climb import NoiseOptimization
from t2i_rl.methods.pairs.softrepa import SoftREPA
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.models.autoregressive.engine.engine import EngineOptions
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.rewards.self_certainty import SelfCertainty
from t2i_rl.tasks.pretrain import train
from tests.support.commands import composed
from tests.support.small_diffusers import pipeline
from tests.support.tiny import PROMPTS, load_tiny_janus, save_tiny_janus

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]
on_cuda = pytest.param("cuda", marks=needs_cuda)
on_both = pytest.mark.parametrize("device", ["cpu", on_cuda])
WEIGHTS = Path(t2i_rl.__file__).parent / "weights"
DENOISER = ("denoiser.steps=2", "denoiser.batch_size=4")
RECIPES = {  # every stage in two steps
    "janus_tiny": (
        *("lm.steps=2", "lm.rows.sizes={draw:4,plan:4,look:4}", "habits.steps=2", "habits.rows.sizes={draw:4,plan:4}"),
        *("look.steps=2", "look.rows.sizes={look:4}"),
    ),
    "sd_tiny": DENOISER,
    "sd3_tiny": DENOISER,
    "flux_tiny": (
        *DENOISER,
        *("one_step.steps=2", "one_step.optimizer.alone=1", "one_step.teacher.batches=2"),
        *("one_step.teacher.batch_size=4", "one_step.teacher.steps=2"),
    ),
}
TEXTS = ["a red circle", "a drawing of a green cross left of a black triangle", "three blue squares"] * 4
SEEDS = list(range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def trainer(
    device: str, steps: int = 2, precision: str = "32-true", folder: Path | None = None, **settings
) -> L.Trainer:
    return L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        precision=precision,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def drawn(janus: Janus):
    janus.prepare()
    return janus.draw_images(TEXTS, [""] * len(TEXTS), SEEDS)


def written(janus: Janus) -> tuple[torch.Tensor, list[str]]:
    janus.prepare()
    _, (tokens, _), plans = janus.draw_plans(TEXTS, SEEDS)
    return tokens, plans


@on_both
@pytest.mark.parametrize("max_rows", [None, 5])
def test_what_decoding_sees_is_what_the_plain_forward_gives(folder, device, max_rows):
    """In nats. Logits spread over tens of nats here, so that TF32 would be off by 0.01 and more; float32 is not."""
    janus = load_tiny_janus(folder, device=device, rollout=EngineOptions(max_rows=max_rows))
    (ids, mask), images = drawn(janus)
    assert images.tokens.device.type == device and images.tokens.unique().numel() > 10
    guided = janus(image=(ids, mask, images.tokens), distribution="guided")
    conditional = janus(image=(ids, mask, images.tokens), distribution="conditional")
    for plain, decoded in (
        (guided.logprobs, images.logprobs),
        (guided.self_certainty, images.guided_self_certainty),
        (conditional.self_certainty, images.conditional_self_certainty),
    ):
        gaps = (plain - decoded).abs()
        assert gaps.mean() < 1e-4 and gaps.max() < 1e-3


@pytest.mark.parametrize("device", [on_cuda])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_draw_and_write_what_plain_steps_do(folder, device, dtype):
    plain, recorded = (
        load_tiny_janus(folder, device=device, dtype=dtype, rollout=EngineOptions(graphs=graphs))
        for graphs in (False, True)
    )
    images, again = (
        drawn(plain)[1],
        [drawn(recorded)[1] for _ in range(2)],
    )  # the second replays what the first recorded
    for other in again:
        assert torch.equal(images.tokens, other.tokens)
        torch.testing.assert_close(images.logprobs, other.logprobs, rtol=0, atol=1e-5)
    assert written(plain)[1] == written(recorded)[1] == written(recorded)[1]


@pytest.mark.parametrize("device", [on_cuda])
def test_recorded_steps_follow_weights_that_have_changed(folder, device):
    """The graphs read the packed weights where they lie: an update between two rollouts must reach them."""
    plain, recorded = (
        load_tiny_janus(folder, device=device, rollout=EngineOptions(graphs=graphs)) for graphs in (False, True)
    )
    before = drawn(recorded)[1].tokens
    for janus in (plain, recorded):
        with torch.no_grad():
            janus.model.model.language_model.norm.weight.mul_(0.5)
    after = drawn(recorded)[1].tokens
    assert not torch.equal(before, after) and torch.equal(after, drawn(plain)[1].tokens)


def grpo(folder: str, device: str) -> GRPO:
    janus, optimizer = load_tiny_janus(folder, device=device), partial(torch.optim.SGD, lr=1e-2)
    settings = {"group_size": 3, "micro_batch_size": 4, "kl_coef": 0.1, "logprob": "guided"}
    return GRPO(janus, SelfCertainty(), optimizer, **settings)


def prompts() -> DataLoader:
    return DataLoader([list(enumerate(PROMPTS))] * 2, batch_size=None, collate_fn=list)


@on_both
@pytest.mark.parametrize(("precision", "gap"), [("32-true", 1e-4), ("bf16-mixed", 0.03)])
def test_two_steps_of_grpo_learn_from_the_policy_that_drew(folder, device, precision, gap):
    module = grpo(folder, device)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    run = trainer(device, precision=precision)
    run.fit(module, prompts())
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    changed = {
        name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name].to(value))
    }
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    assert abs(logged["train/ratio_mean"] - 1) < 1e-3 and abs(logged["image/behaviour_gap"]) < gap
    assert 0 < logged["train/grad_norm"] < float("inf")


@on_both
def test_grpo_resumed_after_a_step_ends_where_it_ends_uninterrupted(folder, tmp_path, device):
    """On a GPU sums may come in another order, so equal to float32's rounding, not to the bit."""
    whole, half, resumed = (grpo(folder, device) for _ in range(3))
    trainer(device, 2, callbacks=[RNGState()]).fit(whole, prompts())
    first = trainer(device, 1, callbacks=[RNGState()])
    first.fit(half, prompts())
    first.save_checkpoint(tmp_path / "one.ckpt")
    second = trainer(device, 2, callbacks=[RNGState()])
    second.fit(resumed, prompts(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert second.global_step == 2 and resumed.rollouts_done == 2
    start = grpo(folder, device).state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(value.cpu(), start[name].cpu()) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("device", [on_cuda])
def test_the_gpus_generator_goes_on_where_it_was_saved(device):
    torch.manual_seed(0)
    torch.rand(3, device=device)
    saved, expected = generators(), torch.rand(3, device=device)
    torch.rand(5, device=device)
    set_generators(saved)
    assert torch.equal(torch.rand(3, device=device), expected)


@on_both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_steps_of_softrepa_learn_tokens_alone(tmp_path, device, precision):
    model = SD3(str(pipeline("sd3", tmp_path / "sd3")), max_sequence_length=2, device=device)
    # An untrained model tells texts apart by little: at the paper's temperature there would be no gradient.
    method = SoftREPA(model, partial(torch.optim.SGD, lr=1.0), temperature=1.0, pairs_per_pass=6)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    batches = DataLoader(ShapesStream(4, {"colors": 0.5, "color_attr": 0.5}, 0, 0), batch_size=None)
    run = trainer(device, precision=precision, folder=tmp_path)
    run.fit(method, batches)
    after = method.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value.cpu(), after[name].cpu())}
    assert changed and all(name.startswith("bank.") for name in changed)
    assert torch.isfinite(run.callback_metrics["train/loss"]) and run.callback_metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("device", [on_cuda])
@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_of_the_shipped_models_is_trained_on(tmp_path, device, name):
    settings = [f"task.recipes.{name}.{setting}" for setting in RECIPES[name]]
    weights = WEIGHTS / name
    given = [f"paths.output_dir={tmp_path}", f"task.initial_weights={weights}", "task.minutes=1", "task.workers=2"]
    model, _ = train(composed("task=pretrain", f"model={name}", *given, *settings))
    assert model.path == str(tmp_path / name)
    learnt = {"janus_tiny": "model.safetensors", "sd_tiny": "unet/*.safetensors"}.get(name, "transformer/*.safetensors")
    before, after = (load_file(next(folder.glob(learnt))) for folder in (weights, tmp_path / name))
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.isfinite(value).all() for value in after.values())


class Redness:
    """How red a picture is."""

    differentiable = True

    def score_pixels(self, pixels: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        return pixels[:, 0].mean(dim=(1, 2)) - pixels[:, 1:].mean(dim=(1, 2, 3))


@on_both
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_noise_climbs_its_reward_and_stays_gaussian(tmp_path, device, gradient_checkpointing):
    model = Flux(str(pipeline("flux", tmp_path / "flux")), size=32, max_sequence_length=16, device=device)
    method = NoiseOptimization(
        model,
        Redness(),
        {},
        Regularizer({"1": Moment(1), "2": Moment(2), "s": Spectrum(bins="full", permutation="fresh", weight=25.0)}),
        partial(torch.optim.SGD, lr=5.0, momentum=0.9, nesterov=True),
        folder=tmp_path / "noise",
        iterations=4,
        batch_size=2,
        gradient_checkpointing=gradient_checkpointing,
    )
    method.prompts = [Prompt("p0", "a red circle"), Prompt("p1", "two blue squares")]
    trainer(device, inference_mode=False).predict(method)
    cases = method.finished()
    assert len(cases) == 2 and all(case["best"]["target"] > case["initial"]["target"] for case in cases)
