"""FlowEdit agrees with a step-by-step computation.

Its guidance conventions and the edits of `shapes` with their known answers are tested here too.
"""

import numpy as np
import pytest
import torch

from t2i_rl.core.errors import UserError
from t2i_rl.core.seeding import derive_seed, row_normals
from t2i_rl.models.diffusion.flow_edit import flow_edit, guided
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, spec_for
from t2i_rl.shapes.edits import KINDS, psnr, sample_edit
from t2i_rl.shapes.judge import judge
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.render import render
from tests.support.small_diffusers import pipeline

SOURCE, TARGET = ["a red circle", "two squares"], ["a blue circle", "a cross"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return SD3(str(pipeline("sd3", tmp_path_factory.mktemp("sd3") / "p")), max_sequence_length=2).requires_grad_(False)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_is_the_written_algorithm(model, latents):
    """FlowEdit's Algorithm 1 is done by hand, one picture and one prediction at a time.

    It goes along the scheduler's own shifted times.
    """
    settings = {"steps": 5, "start": 3, "source_guidance": 2.0, "target_guidance": 4.0, "average": 2}
    edited = flow_edit(model, latents, SOURCE, TARGET, [3, 4], **settings)
    model.pipe.scheduler.set_timesteps(5)
    grid = [float(t) / 1000 for t in model.pipe.scheduler.timesteps] + [0.0]
    for row, seed in ((0, 3), (1, 4)):
        texts = {
            name: model.encode_prompts([words])
            for name, words in (("null", ""), ("source", SOURCE[row]), ("target", TARGET[row]))
        }
        start = latents[row : row + 1]
        state = start.clone()
        for step in (2, 3, 4):
            change = 0
            for draw in range(2):
                noise = row_normals([derive_seed(seed, "edit", step, draw)], (4, 8, 8))
                noised = (1 - grid[step]) * start + grid[step] * noise
                velocity = {}
                for name, place, scale in (("source", noised, 2.0), ("target", state + noised - start, 4.0)):
                    t = torch.tensor([grid[step] * 1000])
                    cond, null = model.predict(place, t, texts[name]), model.predict(place, t, texts["null"])
                    velocity[name] = null + scale * (cond - null)
                change = change + (velocity["target"] - velocity["source"]) / 2
            state = state + (grid[step + 1] - grid[step]) * change
        torch.testing.assert_close(edited[row : row + 1], state, atol=2e-5, rtol=1e-4)


def test_nothing_changes_without_steps_or_without_a_wish(model, latents):
    assert torch.equal(flow_edit(model, latents, SOURCE, TARGET, [1, 2], steps=4, start=0), latents)
    same = flow_edit(model, latents, SOURCE, SOURCE, [1, 2], steps=4, start=4, source_guidance=2.0, target_guidance=2.0)
    torch.testing.assert_close(same, latents, atol=1e-4, rtol=0)
    assert (flow_edit(model, latents, SOURCE, TARGET, [1, 2], steps=4, start=4) - latents).abs().max() > 0.01


def test_the_released_convention_is_one_more_of_guidance(model, latents):
    """Trap T27."""
    cond, null = torch.tensor([3.0]), torch.tensor([1.0])
    assert guided(cond, null, 9.0, "released") == cond + 9 * (cond - null) == guided(cond, null, 10.0)
    released = flow_edit(
        model, latents, SOURCE, TARGET, [1, 2], steps=3, start=2, target_guidance=4.0, convention="released"
    )
    standard = flow_edit(model, latents, SOURCE, TARGET, [1, 2], steps=3, start=2, target_guidance=5.0)
    torch.testing.assert_close(released, standard)


def test_tokens_are_read_by_all_four_predictions(model, latents):
    bank = SoftTokens(spec_for(model.denoiser, 2, 4), std=1.0, generator=torch.Generator().manual_seed(0))
    plain = flow_edit(model, latents, SOURCE, TARGET, [1, 2], steps=2, start=1)
    rows = []
    handle = model.attach(bank)
    hook = model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(
            [len(part) for part in (kwargs["joint_attention_kwargs"] or {}).values()]
        ),
        with_kwargs=True,
    )
    touched = flow_edit(model, latents, SOURCE, TARGET, [1, 2], steps=2, start=1)
    hook.remove()
    handle.remove()
    model.attached = None
    assert rows == [[8]] and (touched - plain).abs().max() > 1e-4


def test_empty_prompts_and_they_alone_read_the_null_branch(model, latents):
    bank = SoftTokens(spec_for(model.denoiser, 2, 4, branches=2), std=1.0, generator=torch.Generator().manual_seed(0))
    bank.null_branch = 1
    inputs = []
    handle = model.attach(bank)
    hook = model.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((kwargs["encoder_hidden_states"], kwargs["joint_attention_kwargs"])),
        with_kwargs=True,
    )
    flow_edit(model, latents, SOURCE, TARGET, [1, 2], steps=2, start=1)
    hook.remove()
    handle.remove()
    model.attached = None
    text, carried = inputs[0]
    tokens = next(iter(carried.values()))
    empty = model.encode_prompts([""]).embeds[0]
    t = torch.full((1,), float(model.pipe.scheduler.timesteps[1]))
    for row in range(8):
        is_empty = bool(torch.equal(text[row], empty))
        assert is_empty == (row < 4)
        torch.testing.assert_close(tokens[row], bank(t, int(is_empty))[0])


def test_options_out_of_range_are_refused(model, latents):
    for wrong in ({"start": 51}, {"start": -1}, {"average": 0}, {"convention": "other"}):
        with pytest.raises(UserError, match="task"):
            flow_edit(model, latents, SOURCE, TARGET, [1, 2], **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_knows_its_answer_and_what_must_stay(kind):
    rng = np.random.default_rng(0)
    for _ in range(30):
        case = sample_edit(kind, rng)
        image = render(case.scene)
        assert not judge(case.meta, detect(image[None])[0]).strict  # the source is not the answer
        objects = {"recolour": 2, "add": 1, "remove": 2}[kind]
        assert (
            len(case.scene.objects) == objects
            and len(case.meta["include"]) == {"recolour": 2, "add": 2, "remove": 1}[kind]
        )
        assert case.source != case.target and 0.05 < case.kept.mean() < 1
        changed = case.scene.objects[-1]
        inside = case.kept[int(changed.y), int(changed.x)]
        assert inside == (kind == "add")


def test_psnr_sees_the_kept_pixels_alone():
    before, kept = np.full((4, 4, 3), 100, np.uint8), np.ones((4, 4), bool)
    after = before.copy()
    after[0, 0] = 255
    kept[0, 0] = False
    assert psnr(before, after, kept) == 99.0
    after[1, 1] = 110
    assert psnr(before, after, kept) == pytest.approx(10 * np.log10(255**2 / (100 / 15)))
    with pytest.raises(ValueError):
        sample_edit("paint", np.random.default_rng(0))
