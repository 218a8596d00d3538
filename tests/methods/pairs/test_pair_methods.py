"""SoftREPA, AGSM and the denoising control: gradients against brute force in float64, chunks, ranks, resuming, and a
backbone that stays."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.used_settings import plain
from t2i_rl.data.pairs import PixelPairs, ShapesPairs, ShapesStream, as_found, share_of
from t2i_rl.methods.pairs.agsm import AGSM, NEGATIVE, POSITIVE
from t2i_rl.methods.pairs.base import Grid
from t2i_rl.methods.pairs.denoising import Denoising
from t2i_rl.methods.pairs.softrepa import SoftREPA
from t2i_rl.models.diffusion.base import TextEncoding
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusion
from t2i_rl.shapes.judge import judge
from tests.support.commands import composed
from tests.support.pair_ranks import fit
from tests.support.small_diffusers import pipeline

ROOT = Path(__file__).parents[3]

SGD = partial(torch.optim.SGD, lr=1.0)
ADAM = partial(torch.optim.AdamW, lr=1e-2)
METHODS = {"softrepa": SoftREPA, "agsm": AGSM, "denoising": Denoising}
LORA = {"tokens": 0, "lora": {"r": 2, "target_modules": ["to_k", "to_v"]}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: str(pipeline(kind, root / kind)) for kind in ("sd15", "sd3")}


def load(folders, kind: str = "sd3"):
    return StableDiffusion(folders[kind]) if kind == "sd15" else SD3(folders[kind], max_sequence_length=2)


def method(folders, name: str, kind: str = "sd3", optimizer=SGD, **options):
    return METHODS[name](load(folders, kind), optimizer, **{"max_grad_norm": None, **options})


def settings_of(name: str, variant: str, kind: str = "sd3") -> dict:
    """What conf/variant says of a method for a kind of model."""
    model = {"sd15": "sd_tiny", "sd3": "sd3_tiny"}[kind]
    return plain(composed(f"method={name}", f"model={model}", f"variant={variant}").presets[name])


def exact_grid(model, images: int = 3, texts: int = 4) -> Grid:
    """A grid in float64 whose own texts are not on the diagonal."""
    draws = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(images, 4, 8, 8, generator=draws, dtype=torch.float64) for _ in range(2))
    text = model.encode_prompts(["a red circle", "two squares", "a cross", "a blue triangle"][:texts])
    t = torch.tensor([15.0, 420.0, 980.0])[:images]
    own = torch.tensor([2, 0, 3])[:images]
    texts = text.map(lambda part: part.double())
    return Grid(model.add_noise(x0, eps, t), t, model.target(x0, eps, t), texts, own)


class Exact:
    """A denoiser in float64 that does not round to float32 on the way out."""

    def __init__(self, module):
        module.double()
        model = module.model
        model.predict = lambda x_t, t, text, soft: model.denoiser(
            hidden_states=x_t,
            timestep=t.double(),
            encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled,
            return_dict=False,
            **model._carried(soft),
        )[0]


def exact_method(folders, name: str, **options):
    module = method(folders, name, **options)
    grid = exact_grid(module.model)
    Exact(module)
    with torch.no_grad():
        for parameter in module.bank.parameters():  # away from the average
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double() * 0.3)
    return module, grid


def one_by_one(module, grid: Grid, bank, branch_of) -> torch.Tensor:
    """Predictions `(R, B, C, h, w)`, a pair at a time, straight from the bank."""
    rows = []
    for i in range(len(grid)):
        row = []
        for j in range(len(grid.text)):
            soft = bank(grid.t[i : i + 1], branch_of(i, j))
            row.append(module.model.predict(grid.x_t[i : i + 1], grid.t[i : i + 1], grid.text[j : j + 1], soft)[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def gradient(module, grid: Grid) -> dict[str, torch.Tensor]:
    """What a training step adds up."""
    emitted = module.emit(module.bank, grid.t)
    tokens = emitted.detach().requires_grad_()
    module.metrics = module.accumulate(grid, tokens)
    (emitted * tokens.grad).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.bank.named_parameters()}
    module.bank.zero_grad()
    return found


def check_gradient(module, grid: Grid, loss: torch.Tensor) -> None:
    expected = torch.autograd.grad(loss, list(module.bank.parameters()))
    found = gradient(module, grid)
    for value, other in zip(found.values(), expected, strict=True):
        assert other.abs().max() > 1e-7
        torch.testing.assert_close(value, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("passes", [1, 3, 4, 100])
def test_softrepa_step_is_the_gradient_of_the_written_loss(folders, passes):
    module, grid = exact_method(folders, "softrepa", denoising_weight=0.5, pairs_per_pass=passes)
    said = one_by_one(module, grid, module.bank, lambda i, j: 0)
    loss = 0.0
    for i in range(3):
        errors = ((said[i] - grid.target[i]) ** 2).flatten(1).mean(dim=1)
        scores = torch.exp(4 * torch.exp(-errors / 0.07))
        own = grid.own[i]
        loss = loss - torch.log(scores[own] / scores.sum()) / 3 + 0.5 * errors[own] / 3
    check_gradient(module, grid, loss)
    assert module.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("passes", [1, 3, 100])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_agsm_step_is_the_gradient_of_the_written_loss(folders, passes, gamma):
    """Targets from the average of the same branch, without gradient; matching and other pairs averaged apart."""
    module, grid = exact_method(folders, "agsm", gamma_negative=gamma, pairs_per_pass=passes)

    def branch(i, j):
        return POSITIVE if j == grid.own[i] else NEGATIVE

    with torch.no_grad():
        reference = one_by_one(module, grid, module.average, branch)
    said = one_by_one(module, grid, module.bank, branch)
    loss = 0.0
    for i in range(3):
        rewards = [-float(((reference[i, j] - grid.target[i]) ** 2).mean()) / 0.1 for j in range(4)]
        shares = [math.exp(reward) for reward in rewards]
        mean = sum(share / sum(shares) * reference[i, j] for j, share in enumerate(shares))
        for j in range(4):
            delta = reference[i, j] - mean
            if j == grid.own[i]:
                loss = loss + ((said[i, j] - grid.target[i] - delta) ** 2).mean() / 3
            else:
                loss = loss + ((said[i, j] - grid.target[i] + gamma * delta) ** 2).mean() / 9
    check_gradient(module, grid, loss)
    assert module.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-6)


def test_agsm_without_guidance_is_denoising_and_released_zero_gamma_leaves_the_others_out(folders):
    module, grid = exact_method(folders, "agsm", gamma_positive=0.0, gamma_negative=0.0, negatives="off_at_zero")
    module.bank.time.requires_grad_(False).zero_()
    said = [one_by_one(module, grid, module.bank, lambda i, j: POSITIVE)[i, grid.own[i]] for i in range(3)]
    loss = sum(((said[i] - grid.target[i]) ** 2).mean() for i in range(3)) / 3
    (expected,) = torch.autograd.grad(loss, [module.bank.tokens])
    emitted = module.emit(module.bank, grid.t)
    tokens = emitted.detach().requires_grad_()
    module.accumulate(grid, tokens)
    (emitted * tokens.grad).sum().backward()
    torch.testing.assert_close(module.bank.tokens.grad, expected, atol=1e-12, rtol=1e-9)
    assert not module.bank.tokens.grad[NEGATIVE].any()


def test_denoising_step_is_the_gradient_of_the_plain_loss(folders):
    module, grid = exact_method(folders, "denoising", pairs_per_pass=2)
    said = one_by_one(module, grid, module.bank, lambda i, j: 0)
    check_gradient(module, grid, sum(((said[i, grid.own[i]] - grid.target[i]) ** 2).mean() for i in range(3)) / 3)


@pytest.mark.parametrize("kind, name", [("sd3", "softrepa"), ("sd15", "agsm"), ("sd3", "agsm"), ("sd15", "denoising")])
def test_the_backbone_stays_and_the_tokens_learn(folders, kind, name):
    module = method(folders, name, kind, optimizer=ADAM)
    before, start = weights_sha256(module.model), {key: value.clone() for key, value in module.state_dict().items()}
    after = fit(module, 3)
    assert weights_sha256(module.model) == before
    assert after.keys() == start.keys() and all(not torch.equal(after[key], start[key]) for key in start)
    assert all(value.dtype == torch.float32 for value in after.values())
    assert module.model.attached.enabled


@pytest.mark.parametrize("name, options", [("softrepa", {}), ("agsm", {}), ("denoising", LORA)])
def test_resumed_is_uninterrupted(folders, tmp_path, name, options):
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    made = partial(method, folders, name, optimizer=ADAM, scheduler=scheduler, schedule_every=3, **options)
    whole = fit(made(), 4)
    fit(made(), 2, save=tmp_path / "2.ckpt")
    resumed = fit(made(), 4, ckpt=tmp_path / "2.ckpt")
    assert whole.keys() == resumed.keys()
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key


@pytest.mark.slow
def test_two_ranks_under_all_texts_train_as_one(folders, tmp_path):
    learnt = []
    for ranks in ("1", "2"):
        command = [sys.executable, "-m", "tests.support.pair_ranks", folders["sd3"], ranks, str(tmp_path / ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        learnt.append(torch.load(tmp_path / ranks, weights_only=True))
    one, two = learnt
    assert one.keys() == two.keys()
    assert float(one.pop("fid")) == pytest.approx(float(two.pop("fid")), rel=1e-9)
    for key in one:
        start = one.get(f"start/{key}", one[key])
        change = float((one[key] - start).abs().max())
        assert change > 0 or key.startswith("start/"), key
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-3 * change, msg=key)


@pytest.mark.parametrize("name", ["softrepa", "agsm", "denoising"])
@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_gradient_checkpointing_changes_nothing(folders, kind, name):
    """AGSM runs its average between the live passes and the backward: the recomputed blocks must not read it."""
    plain = fit(method(folders, name, kind), 2)
    saved = fit(method(folders, name, kind, gradient_checkpointing=True), 2)
    for key in plain:
        assert torch.equal(plain[key], saved[key]), key


def test_draws_are_shared_among_the_texts_of_an_image_and_split_over_images_as_asked(folders):
    batch = next(iter(ShapesStream(4, {"colors": 1.0}, 0, 0)))
    for times, noise in (("shared", "shared"), ("per_image", "per_image")):
        module = method(folders, "softrepa", times=times, noise=noise)
        seen = {}
        module.model.add_noise = lambda x0, eps, t, seen=seen: seen.update(eps=eps, t=t, x0=x0) or x0
        grid = module.grid(batch)
        assert len(seen["t"].unique()) == (1 if times == "shared" else 4)
        assert bool((seen["eps"][0] == seen["eps"][1]).all()) == (noise == "shared")
        assert (seen["t"] == seen["t"].floor()).all() and seen["t"].min() >= 0 and seen["t"].max() <= 999
        again = module.grid(batch)
        assert torch.equal(grid.target, again.target)
        module.batches_done = 1
        assert not torch.equal(module.grid(batch).target, again.target)
    assert not torch.equal(seen["eps"][0], seen["x0"][0])


def test_identical_initial_tokens_stay_identical_and_random_ones_do_not(folders):
    """Attention cannot tell copies apart, so K copies are one token with a louder voice."""
    released = settings_of("softrepa", "released", "sd15")
    copies = method(folders, "softrepa", "sd15", optimizer=ADAM, **released)
    first = copies.model.encode_prompts([""]).embeds[0, 0]
    assert torch.equal(copies.bank.tokens[0, 0], first.expand(4, -1))
    fit(copies, 5)
    spread = (copies.bank.tokens[0, 0] - copies.bank.tokens[0, 0, :1]).abs().max()
    assert float(spread) < 1e-6 and not torch.equal(copies.bank.tokens[0, 0, 0], first)
    random = method(folders, "softrepa", "sd15", optimizer=ADAM)
    assert float((random.bank.tokens[0, 0] - random.bank.tokens[0, 0, :1]).abs().max()) > 1e-2


def test_the_average_follows_the_bank_in_float32_and_starts_as_asked(folders):
    copied = method(folders, "agsm", average_decay=0.75)
    assert torch.equal(copied.average.tokens, copied.bank.tokens) and copied.average.tokens is not copied.bank.tokens
    apart = method(folders, "agsm", average_init="independent")
    assert not torch.equal(apart.average.tokens, apart.bank.tokens)
    start = copied.average.tokens.clone()
    with torch.no_grad():
        copied.bank.tokens.add_(1.0)
    for step in range(1, 4):
        copied.after_step()
        torch.testing.assert_close(copied.average.tokens, start + (1 - 0.75**step))
    assert not copied.average.tokens.requires_grad


def test_variants_set_what_the_sources_contradict_and_what_is_given_wins(folders):
    released = method(folders, "softrepa", "sd15", **settings_of("softrepa", "released", "sd15"))
    assert (released.scale, released.temperature, released.denoising_weight) == (4.0, 0.07, 10.0)
    assert released.bank.spec.layout == {"down_blocks.0": 0} and released.bank.spec.position == "after_bos"
    assert sum(p.numel() for p in released.bank.parameters()) == (4 + 100) * 16
    assert settings_of("softrepa", "released")["denoising_weight"] == 0.0
    assert settings_of("softrepa", "paper")["scale"] == 1.0
    agsm = method(folders, "agsm", **settings_of("agsm", "released"))
    assert (agsm.gamma_negative, agsm.temperature, agsm.reduction, agsm.average_decay) == (0.1, 0.1, "mean", 0.9999)
    assert not torch.equal(agsm.average.tokens, agsm.bank.tokens)
    assert settings_of("agsm", "released", "sd15")["gamma_negative"] == 1.0
    assert settings_of("agsm", "paper")["reduction"] == "sum"
    changes = {"gamma_negative": 0.0, "tokens": 2, "layers": 1}
    given = method(folders, "agsm", **{**settings_of("agsm", "released"), **changes})
    assert given.gamma_negative == 0.0 and not given.trains_negatives and given.bank.tokens.shape == (2, 1, 2, 32)
    assert method(folders, "agsm", gamma_negative=0.0).trains_negatives


def test_options_that_cannot_train_are_refused_in_one_line(folders):
    for name, options in (
        ("softrepa", {"times": "none"}),
        ("softrepa", {"tokens": 0}),
        ("agsm", {"reduction": "max"}),
        ("agsm", {"average_decay": 1.0}),
        ("agsm", {"average_init": "zero"}),
        ("denoising", {"tokens": 0}),
        ("denoising", {"lora": {"r": 2}}),
        ("denoising", {"tokens": 0, "lora": {"rank": 2}}),
        ("softrepa", {"pairs_per_pass": 0}),
        ("softrepa", {"layers": 9}),
        ("softrepa", {"position": "middle"}),
        ("agsm", {"tables": 3}),
    ):
        with pytest.raises(UserError):
            method(folders, name, **options)
    with pytest.raises(UserError, match="for UNets"):
        method(folders, "softrepa", init="bos")


def test_a_checkpoint_of_other_tokens_or_adapters_is_refused(folders, tmp_path):
    """Of equal shape, in other blocks; and adapters where tokens are learnt."""
    made = {
        "down": method(folders, "softrepa", "sd15", layers=["down"]),
        "mid": method(folders, "softrepa", "sd15", layers=["mid"]),
        "lora": method(folders, "denoising", "sd15", **LORA),
        "tokens": method(folders, "denoising", "sd15"),
    }
    for module in made.values():
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        module.on_load_checkpoint(checkpoint)
        for other in made.values():
            if other is not module:
                words = "other soft tokens, or other adapters" if type(other) is type(module) else "was trained by"
                with pytest.raises(UserError, match=words):
                    other.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["softrepa", "agsm"])
def test_one_text_alone_is_nothing_to_learn_from(folders, name):
    """As on four ranks with a batch of four: the cross-entropy of one class is 0, and nothing would be trained."""
    batch = next(iter(ShapesStream(2, {"colors": 1.0}, 0, 0)))
    lonely = PixelPairs(batch.numbers[:1], batch.captions[:1], batch.pixels[:1])
    with pytest.raises(UserError, match="raise data.batch_size"):
        method(folders, name).grid(lonely)
    assert len(method(folders, "denoising").grid(lonely)) == 1


def test_tokens_remember_what_the_empty_prompt_reads(folders, tmp_path):
    module = method(folders, "agsm", null_branch=1, optimizer=ADAM)
    fit(module, 1, folder=tmp_path)
    assert module.model.sampling()["null_branch"] == 1
    model = SD3(folders["sd3"], max_sequence_length=2, steps=1, soft_tokens=str(tmp_path / "soft_tokens.safetensors"))
    assert model.attached.null_branch == 1
    with pytest.raises(UserError, match="branch for the empty prompt"):
        model.sample(["a red circle", "a cross"], [0, 1], guidance_scale=1.0)
    assert len(model.sample(["a red circle"], [0])) == 1
    with pytest.raises(UserError, match="null_branch"):
        method(folders, "agsm", null_branch=2)


def test_a_checkpoint_goes_on_in_another_dtype_of_its_backbone_and_on_no_other(folders, tmp_path):
    fit(method(folders, "softrepa"), 1, save=tmp_path / "1.ckpt")
    half = SoftREPA(SD3(folders["sd3"], dtype="bfloat16", max_sequence_length=2), SGD, max_grad_norm=None)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    half.on_load_checkpoint(saved)
    assert half.batches_done == 1
    other = str(pipeline("sd3", tmp_path / "other", seed=7))
    with pytest.raises(UserError, match="other weights than model.path holds"):
        fit(SoftREPA(SD3(other, max_sequence_length=2), SGD), 2, ckpt=tmp_path / "1.ckpt")


def test_shapes_pairs_hold_no_false_negative_and_every_rank_its_share(monkeypatch):
    data = ShapesPairs(batch_size=12)
    examples = []
    from t2i_rl.data import pairs

    original = pairs.distinct_examples
    monkeypatch.setattr(pairs, "distinct_examples", lambda *given: examples.append(original(*given)) or examples[-1])
    batch = next(iter(ShapesStream(12, data.weights, 0, 3)))
    for i, (_, scene) in enumerate(examples[0]):
        for j, (prompt, _) in enumerate(examples[0]):
            assert judge(prompt.meta, as_found(scene)).strict == (i == j)
    assert batch.captions == [prompt.text for prompt, _ in examples[0]] and batch.pixels.shape == (12, 3, 32, 32)
    assert share_of(12) == (0, 12)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    part = next(iter(ShapesStream(12, data.weights, 0, 3)))
    assert (
        part.numbers == [8, 9, 10, 11]
        and part.captions == batch.captions[8:]
        and torch.equal(part.pixels, batch.pixels[8:])
    )
    with pytest.raises(UserError, match="multiple"):
        share_of(13)
    monkeypatch.undo()
    for wrong in ({"batch_size": 1}, {"tasks": ()}, {"tasks": ("walking",)}):
        with pytest.raises(UserError):
            ShapesPairs(**wrong)


def test_rows_of_a_batch_do_not_depend_on_one_another(folders):
    module = method(folders, "softrepa")
    batch = next(iter(ShapesStream(4, {"colors": 1.0}, 0, 0)))
    whole = module.grid(batch)
    part = module.grid(PixelPairs([2, 3], batch.captions[2:], batch.pixels[2:]))
    torch.testing.assert_close(part.x_t, whole.x_t[2:], atol=1e-5, rtol=1e-5)
    assert torch.equal(part.t, whole.t[2:])
    assert isinstance(whole.text, TextEncoding)


def test_plain_attention_products_are_chosen_in_bfloat16_on_a_cpu_alone(folders):
    from contextlib import nullcontext

    from t2i_rl.models.diffusion.base import attention_for_training

    model = load(folders)
    assert isinstance(attention_for_training(model), nullcontext)
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(attention_for_training(model), nullcontext)
    assert not isinstance(
        attention_for_training(SD3(folders["sd3"], dtype="bfloat16", max_sequence_length=2)), nullcontext
    )
