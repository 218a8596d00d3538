"""IRG's training: the loss is the written one however it is packed, two ranks are one, a resumed run is an
uninterrupted one, the mean is the mean."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from t2i_rl.core.errors import UserError
from t2i_rl.methods.irg.data import Trajectories, TrajectoryStream
from t2i_rl.methods.irg.make import Maker
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.irg.rows import Material, row_of
from t2i_rl.methods.irg.toy_format import write_shard
from t2i_rl.methods.irg.training import IRG, saved_average, saved_by_irg
from t2i_rl.methods.irg.trajectory import MODES, STAGES, Trajectory
from t2i_rl.methods.irg.world import World
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.interleaved import NO_LABEL
from t2i_rl.models.autoregressive.packing import block_mask, pack, places
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.render import render
from t2i_rl.shapes.text import plan
from tests.support.tiny import load_tiny_janus, save_tiny_janus
from tests.support.training import quiet_trainer

FULL = ("initial_full_learning", "improving_full_learning")


def materials(count: int) -> list[Material]:
    rng, rows = np.random.default_rng(3), []
    for _ in range(count):
        (prompt, scene), (_, weak) = sample_example(rng), sample_example(rng)
        good, bad = (plan(scene), render(scene)), (plan(weak), render(weak))
        rows.append(Material(prompt, *good, *bad, f"draw. {plan(scene)}", render(scene)))
    return rows


@pytest.fixture(scope="module")
def janus_folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Two shards of three rows for every mode."""
    folder, items = tmp_path_factory.mktemp("irgl"), materials(6)
    for mode in MODES:
        for shard in range(2):
            rows = [Trajectory(row_of(mode, item, World.questions)) for item in items[3 * shard : 3 * shard + 3]]
            write_shard(folder / mode / f"{shard}.parquet", rows)
    return folder


class Raw(IRG):
    """Ends with the weights that train, and remembers those after each step."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.after: list[dict[str, torch.Tensor]] = []

    def after_step(self) -> None:
        super().after_step()
        self.after.append({name: value.detach().clone() for name, value in self.learning()})

    def on_fit_end(self) -> None:
        pass


def method(folder: str, **options) -> Raw:
    settings = {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "max_grad_norm": 1e9,
        "tokens_per_pass": 600,
        "interleave": Rounds(),
    }
    return Raw(load_tiny_janus(folder), **settings | options)


def fit(module: IRG, data: Trajectories, steps: int, ranks: int = 1, ckpt=None, save=None) -> IRG:
    trainer = quiet_trainer(steps, ranks)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    if save:
        trainer.save_checkpoint(save)
    return module


def test_packing_wastes_little_and_loses_nothing():
    lengths = [10, 300, 40, 120, 290, 5, 170]
    passes = pack(lengths, 620)
    numbers = sorted(number for rows in passes for row in rows for number in row)
    assert numbers == list(range(len(lengths)))
    for rows in passes:
        assert len(rows) <= 2 and all(sum(lengths[i] for i in row) <= 300 for row in rows)
    assert sum(map(len, passes)) == 4  # 935 places in rows of 300
    assert pack([50], 10) == [[[0]]]


def test_a_packed_row_sees_itself_alone():
    owner, position = places([[2, 3], [4]])
    assert owner.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]]
    assert position.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    seen = block_mask(owner)[0, 0]
    for i in range(5):
        for j in range(5):
            assert seen[i, j] == (j <= i and (i < 2) == (j < 2))


@torch.no_grad()
def test_packed_conversations_lose_what_they_lose_alone(janus_folder):
    inter = method(janus_folder).interleaved
    several = [row_of(mode, item, World.questions) for mode, item in zip(MODES, materials(6), strict=True)]
    together = [inter([[several[i] for i in row] for row in rows])[0] for rows in inter.passes(several, 600)]
    alone = [inter([[segments]])[0] for segments in several]
    for kind in ("text", "image"):
        assert float(sum(part[kind][0].sum() for part in together)) == pytest.approx(
            float(sum(part[kind][0].sum() for part in alone)), rel=1e-5
        )


def written_loss(inter, conversations) -> torch.Tensor:
    """By plain forwards of one conversation each: a mean over all text tokens and one over all image tokens."""
    sums, counts = {"text": 0.0, "image": 0.0}, {"text": 0, "image": 0}
    for segments in conversations:
        laid = inter.lay_out(segments)
        hidden = inter.model.model.language_model(inputs_embeds=laid.embeds[None], use_cache=False).last_hidden_state[0]
        for kind, head in (("text", inter.model.lm_head), ("image", inter.model.model.generation_head)):
            labels = getattr(laid, kind)
            for place in (labels != NO_LABEL).nonzero()[:, 0].tolist():
                sums[kind] = sums[kind] - F.log_softmax(head(hidden[place]), dim=-1)[labels[place]]
                counts[kind] += 1
    return sums["text"] / counts["text"] + 2 * sums["image"] / counts["image"]


@pytest.mark.parametrize("tokens_per_pass", [300, 100_000])
def test_one_step_follows_the_gradient_of_the_written_loss(janus_folder, data_folder, tokens_per_pass):
    data = Trajectories(str(data_folder), batch_size=4, weights=dict.fromkeys(MODES, 1.0))
    options = dict.fromkeys(("drop_prompt", "drop_reflection", "drop_image"), 0.0)
    options |= {"image_loss_weight": 2.0, "tokens_per_pass": tokens_per_pass}
    ours, theirs = (method(janus_folder, **options) for _ in range(2))
    batch = next(iter(TrajectoryStream(data.shards(), data.weights, 4, 0, 0)))
    assert {mode for _, mode, _ in batch} & set(FULL)
    written_loss(theirs.interleaved, [segments for _, _, segments in batch]).backward()
    before = {name: value.clone() for name, value in theirs.learning()}
    fit(ours, data, 1)
    largest = max(float(value.grad.abs().max()) for _, value in theirs.learning() if value.grad is not None)
    for name, value in ours.learning():
        grad = dict(theirs.learning())[name].grad
        moved = (before[name] - value) / 0.1
        torch.testing.assert_close(
            moved, torch.zeros_like(moved) if grad is None else grad, rtol=1e-3, atol=2e-4 * largest
        )


def test_only_the_codes_stay_as_they_are(janus_folder, data_folder):
    module = method(janus_folder)
    frozen = {name: value.clone() for name, value in module.named_parameters() if not value.requires_grad}
    assert {name.split("model.model.")[1].split(".")[0] for name in frozen} == {"vqmodel"}
    learning = {name.split("janus.model.")[1].split(".")[1] for name, _ in module.learning()} - {"weight"}
    assert learning == {
        "language_model",
        "vision_model",
        "aligner",
        "generation_embeddings",
        "generation_aligner",
        "generation_head",
    }
    fit(module, Trajectories(str(data_folder), batch_size=4), 1)
    assert all(torch.equal(value, frozen[name]) for name, value in module.named_parameters() if name in frozen)


@pytest.mark.slow
def test_two_ranks_train_as_one(janus_folder, data_folder):
    start = {name: value.clone() for name, value in method(janus_folder).learning()}
    one, two = (
        dict(fit(method(janus_folder), Trajectories(str(data_folder), batch_size=6), 3, ranks).learning())
        for ranks in (1, 2)
    )
    change = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert change > 0
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4 * change)


def test_a_resumed_run_is_an_uninterrupted_one(janus_folder, data_folder, tmp_path):
    scheduler = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=6)
    options = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "scheduler": scheduler}
    whole = fit(method(janus_folder, **options), Trajectories(str(data_folder), batch_size=4), 4)
    fit(method(janus_folder, **options), Trajectories(str(data_folder), batch_size=4), 2, save=tmp_path / "half.ckpt")
    onward = fit(
        method(janus_folder, **options), Trajectories(str(data_folder), batch_size=4), 4, ckpt=tmp_path / "half.ckpt"
    )
    for (name, a), (_, b) in zip(whole.learning(), onward.learning(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(whole.average[name], onward.average[name]), name
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["irg"]["batches_done"] == 2 and not any("vqmodel" in name for name in saved["state_dict"])


def test_the_mean_is_the_exponential_one_and_is_what_draws(janus_folder, data_folder):
    module = method(janus_folder, ema=0.75)
    first = {name: value.detach().clone() for name, value in module.learning()}
    fit(module, Trajectories(str(data_folder), batch_size=2), 3)
    name = max(first, key=lambda name: float((module.after[-1][name] - first[name]).abs().max()))
    expected = 0.75**3 * first[name] + sum(0.25 * 0.75 ** (2 - i) * module.after[i][name] for i in range(3))
    torch.testing.assert_close(module.average[name], expected)
    parameter = dict(module.learning())[name]
    with module.averaged():
        assert torch.equal(parameter, module.average[name])
    assert torch.equal(parameter, module.after[-1][name])
    IRG.on_fit_end(module)
    assert torch.equal(parameter, module.average[name])


def test_a_later_stage_starts_from_the_mean_of_the_one_before(janus_folder, data_folder, tmp_path):
    first = fit(method(janus_folder), Trajectories(str(data_folder), batch_size=2), 2, save=tmp_path / "one.ckpt")
    second = method(janus_folder, start_from=str(tmp_path / "one.ckpt"))
    second.setup("fit")
    for name, value in second.learning():
        assert torch.equal(value, first.average[name])
    drawn = method(janus_folder)
    assert drawn.load(str(tmp_path / "one.ckpt")) == 2
    assert all(torch.equal(value, first.average[name]) for name, value in drawn.learning())
    with pytest.raises(UserError, match="was trained from other weights than model.path holds"):
        saved_average(tmp_path / "one.ckpt", "another model's")
    (tmp_path / "no.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="no.ckpt is no checkpoint of a training run"):
        saved_by_irg(tmp_path / "no.ckpt")
    with pytest.raises(UserError, match="start_from=none.ckpt: there is no such file"):
        saved_by_irg(Path("none.ckpt"))
    for less in ({"trainable": (r"lm_head\.",)}, {"lora": {"r": 2}}):
        with pytest.raises(UserError, match="give its run's method.trainable and method.lora"):
            method(janus_folder, **less).load(str(tmp_path / "one.ckpt"))
    with pytest.raises(UserError, match="holds other weights"):
        method(janus_folder, start_from=str(tmp_path / "one.ckpt"), trainable=(r"lm_head\.",)).setup("fit")


def test_what_is_dropped_is_what_guidance_lacks(janus_folder):
    item = materials(1)[0]
    always = method(janus_folder, drop_prompt=0.99, drop_reflection=0.99, drop_image=0.99)
    improving, initial = (row_of(mode, item, World.questions) for mode in reversed(FULL))
    assert always.dropped(0, initial) == (initial, True) and always.dropped(0, improving) == (improving, True)
    negatives = method(janus_folder, drop_prompt=0.0, drop_reflection=0.99, drop_image=0.99)
    assert [segment.role for segment in negatives.dropped(0, improving)[0]] == ["prompt", "think", "redraw"]
    blind = method(janus_folder, drop_prompt=0.0, drop_reflection=0.0, drop_image=0.99)
    left = blind.dropped(0, improving)[0]
    assert [segment.role for segment in left] == ["prompt", "think", "reflect", "redraw"]
    assert [segment.loss for segment in left] == [False, False, False, True]
    for mode in MODES:
        if mode not in FULL:
            rows = row_of(mode, item, World.questions)
            assert always.dropped(0, rows) == (rows, False)
    some = method(janus_folder, drop_reflection=0.25, drop_image=0.0, drop_prompt=0.0)
    shares = [len(some.dropped(number, improving)[0]) == 4 for number in range(2000)]
    assert abs(np.mean(shares) - 0.25) < 0.03


@torch.no_grad()
def test_a_picture_after_the_unconditional_is_scored_as_it_is_drawn(janus_folder):
    inter = method(janus_folder).interleaved
    segments = row_of("initial_full_learning", materials(1)[0], World.questions)
    lost, _ = inter([[segments]], [[True]])
    assert inter.counts(segments, blank=True) == {"text": 0, "image": inter.tokens} and len(lost["text"][0]) == 0
    before = inter.lay_out(segments[:2], opening="draw").embeds
    ids = torch.tensor([[inter.special["bos"], *[inter.special["pad"]] * (len(before) - 2), inter.special["boi"]]])
    codes = nearest_codes(inter.model.model.vqmodel, inter.pixels(segments[2].image))
    scored = inter.janus(image=(ids, torch.ones_like(ids), codes))
    assert float(lost["image"][0].sum()) == pytest.approx(float(scored.logprobs.sum()), rel=1e-5)


def test_the_stream_has_the_shares_of_its_stage_and_goes_on_anywhere(data_folder):
    data = Trajectories(str(data_folder), stage=1, batch_size=50)
    stream = iter(TrajectoryStream(data.shards(), data.weights, 50, 4, 0))
    batches = [next(stream) for _ in range(20)]
    drawn = [mode for batch in batches for _, mode, _ in batch]
    for mode, share in STAGES[1].items():
        assert abs(drawn.count(mode) / 1000 - share) < 0.04
    later = next(iter(TrajectoryStream(data.shards(), data.weights, 50, 4, 19)))
    assert [(mode, segments) for _, mode, segments in later] == [(mode, segments) for _, mode, segments in batches[19]]
    mode = FULL[0]
    rows = [segments[0].text + segments[1].text for batch in batches for _, which, segments in batch if which == mode]
    assert len(set(rows[:6])) == 6 and set(rows[6:12]) == set(rows[:6])  # every row once an epoch
    assert rows[:6] != rows[6:12] or rows[6:12] != rows[12:18]
    assert set(Trajectories(str(data_folder), stage=2).weights) == set(FULL)


def test_data_that_cannot_be_learnt_from_is_refused(data_folder, tmp_path):
    for options, words in (
        ({"stage": 3}, "stage must be one of 1, 2"),
        ({"weights": {"all": 1.0}}, "there is no mode 'all'"),
        ({"batch_size": 0}, "batch_size"),
        ({"weights": {FULL[0]: -1.0}}, "0 or more"),
    ):
        with pytest.raises(UserError, match=words):
            Trajectories(str(data_folder), **options)
    with pytest.raises(
        UserError, match="has no rows of initial_thinking_understanding_learning: make them with task=make_irgl"
    ):
        Trajectories(str(tmp_path))


@pytest.mark.parametrize("weights", [[1, 2], {"initial_full_learning": "abc"}])
def test_shares_of_modes_are_numbers_by_name(data_folder, weights):
    with pytest.raises(UserError, match=r"data\.weights(\.initial_full_learning)? must be a (mapping|number)"):
        Trajectories(str(data_folder), weights=weights)


def test_adapters_learn_start_anew_and_do_not_change_what_data_is_made_with(janus_folder, data_folder, tmp_path):
    data, lora = Trajectories(str(data_folder), batch_size=2), {"r": 2, "lora_alpha": 4}
    first = fit(method(janus_folder, lora=lora), data, 2, save=tmp_path / "one.ckpt")
    names = [name for name, _ in first.learning()]
    assert names and all("lora_" in name for name in names)
    drawn = method(janus_folder, lora=lora)
    assert drawn.load(str(tmp_path / "one.ckpt")) == 2
    assert all(torch.equal(value, first.average[name]) for name, value in drawn.learning())
    maker, plain = Maker(World()), method(janus_folder)
    assert maker.settings(drawn.model, [])["weights_sha256"] == maker.settings(plain.model, [])["weights_sha256"]


def test_an_empty_text_is_learnt_as_its_end(janus_folder):
    module = method(janus_folder)
    segments = row_of("initial_full_learning", replace(materials(1)[0], thought=""), World.questions)
    assert module.interleaved.counts(segments)["text"] == 1
    scored, _ = module.interleaved([[segments]])
    assert len(scored["text"][0]) == 1 and torch.isfinite(scored["text"][0]).all()


def test_options_that_cannot_train_are_refused(tmp_path):
    options = {
        **dict.fromkeys(("text_loss_weight", "image_loss_weight"), 1.0),
        **dict.fromkeys(("drop_prompt", "drop_reflection", "drop_image"), 0.1),
        **dict.fromkeys(("judge", "start_from", "lora", "scheduler")),
        "ema": 0.9,
        "tokens_per_pass": 100,
        "interleave": Rounds(),
        "on_nonfinite": "raise",
        "trainable": ["lm_head"],
        "optimizer": partial(torch.optim.SGD, lr=0.1),
    }
    IRG.check(options)
    (tmp_path / "no.ckpt").write_bytes(b"no checkpoint")
    for change, words in (
        ({"image_loss_weight": -1.0}, "0 or more"),
        ({"ema": 1.0}, "method.ema"),
        ({"start_from": str(tmp_path / "no.ckpt")}, "is no checkpoint of a training run"),
        ({"lora": {"rank": 2}}, "method.lora"),
        ({"lora": {"r": 2, "use_dora": True}}, "merge plain LoRA"),
    ):
        with pytest.raises(UserError, match=words):
            IRG.check(options | change)


def test_a_trajectory_longer_than_the_models_positions_is_refused(janus_folder, monkeypatch):
    module = method(janus_folder)
    monkeypatch.setattr(module.interleaved.model.config.text_config, "max_position_embeddings", 60)
    with pytest.raises(UserError, match="and the model has 60 positions"):
        module.packed([row_of("improving_full_learning", materials(1)[0], World.questions)])
