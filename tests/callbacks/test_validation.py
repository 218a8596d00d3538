"""Validation while training, and the Frechet distance.

Of validation: what it logs, which checkpoint it keeps, what it says of a task that falls.
"""

import csv
import os
import signal
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image

from t2i_rl.benchmarks.shapes import Shapes
from t2i_rl.callbacks.checkpoint import CheckpointEvery
from t2i_rl.callbacks.validation import Validate
from t2i_rl.core.contracts import Generation, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.evaluation.fid import frechet_distance
from t2i_rl.evaluation.inception import InceptionFeatures
from t2i_rl.methods.pairs.softrepa import SoftREPA
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.soft_tokens import SoftTokens
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import sample_scene
from t2i_rl.shapes.suites import wishes
from t2i_rl.tasks.loggers import csv_logger
from tests.support.pair_ranks import FourPairs
from tests.support.small_diffusers import pipeline

TASKS = ("single_object", "counting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(pipeline("sd3", tmp_path_factory.mktemp("sd3") / "p"))


class Painter:
    """Draws right renders for a share of the prompts of each task, and blank images for the others.

    The shares are the step's with tokens, and `base` without them.
    """

    def __init__(self, benchmark, shares: list[dict], base: dict, method):
        self.benchmark, self.shares, self.base, self.method, self.calls = benchmark, shares, base, method, 0

    def __call__(self, prompts, seeds, mode="direct", fresh=True) -> Generation:
        assert mode == "direct" and len(set(seeds)) == len(seeds)
        share = self.shares[self.calls] if self.method.model.attached.enabled else self.base
        self.calls += self.method.model.attached.enabled
        by_text = {prompt.text: prompt for prompt in self.benchmark.prompts()}
        rng, images = np.random.default_rng(0), []
        done = dict.fromkeys(TASKS, 0)
        for text in prompts:
            prompt = by_text[text]
            wanted = sum(other.tag == prompt.tag for other in self.benchmark.prompts()) * share[prompt.tag]
            right = done[prompt.tag] < wanted
            done[prompt.tag] += 1
            images.append(render(sample_scene(wishes(prompt), rng)) if right else np.full((32, 32, 3), 240, np.uint8))
        return Generation(np.stack(images), [""] * len(prompts), [0] * len(prompts))


class Brightness(Reward):
    def __call__(self, rollout) -> RewardOutput:
        return RewardOutput(torch.tensor([float(image.mean()) for image in rollout.images]))


def share(single: float, counting: float) -> dict:
    return {"single_object": single, "counting": counting}


class StopAt(L.Callback):
    """Has the run stopped while a step is under way."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(folder, out, shares, steps: int, ckpt=None, every: int | None = None, stop_at: int | None = None, **options):
    """`every`: checkpoints every so many steps, as a run has them; `stop_at`: SIGTERM in that step."""
    method = SoftREPA(
        SD3(folder, max_sequence_length=2), partial(torch.optim.SGD, lr=1.0), temperature=1.0, pairs_per_pass=4
    )
    benchmark = Shapes(tasks=TASKS, prompts_per_task=10, samples_per_prompt=1, split="validation")
    callback = Validate(
        str(out / "checkpoints"), benchmark, {"bright": Brightness()}, every_n_steps=2, batch_size=100, **options
    )
    method.model.generate = Painter(benchmark, shares, share(1.0, 0.5), method)
    others = [CheckpointEvery(str(out / "checkpoints"), every)] if every else []
    others += [StopAt(stop_at)] if stop_at else []
    trainer = trainer_with([callback, *others], out, steps)
    trainer.fit(method, FourPairs(), ckpt_path=ckpt, weights_only=True)
    return method, callback, trainer


def trainer_with(callbacks: list, out, steps: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=callbacks,
        logger=CSVLogger(out, name="", version=""),
        enable_checkpointing=any(isinstance(callback, CheckpointEvery) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        log_every_n_steps=1,
    )


def rows_of(out) -> list[dict]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_run_ends_with_the_checkpoint_that_judged_best(folder, tmp_path, capsys):
    shares = [share(1.0, 0.8), share(1.0, 0.2), share(0.9, 0.5)]
    method, callback, trainer = fit(folder, tmp_path, shares, steps=5)
    assert (callback.best_step, callback.best_value) == (2, pytest.approx(0.9))
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in method.state_dict().items():
        assert torch.equal(value, best[name])
    said = capsys.readouterr().out
    assert "best val/overall 0.900 at step 2" in said
    assert said.count("val/counting fell from 0.50 (untouched model) to 0.20") == 1
    rows = rows_of(tmp_path)
    measured = [row for row in rows if row["val/overall"]]
    assert [int(row["step"]) for row in measured] == [2, 4, 5]
    assert [float(row["val/counting"]) for row in measured] == pytest.approx([0.8, 0.2, 0.5])
    base = next(row for row in rows if row["val_base/overall"])
    assert float(base["val_base/counting"]) == pytest.approx(0.5) and int(base["step"]) == 0
    assert float(measured[0]["val/under_counted"]) == pytest.approx(0.2) and float(measured[0]["val/over_counted"]) == 0
    assert float(measured[0]["val/bright"]) > 100 and 0 < float(measured[0]["val/fid"]) < float(measured[1]["val/fid"])
    tokens = method.bank.tokens.detach().clone()
    last, _, _ = fit(folder, tmp_path / "last", shares, steps=5, best=None)
    assert not torch.equal(last.bank.tokens, tokens)


def test_where_less_is_better_the_smallest_is_the_best(folder, tmp_path):
    shares = [share(1.0, 0.2), share(1.0, 0.8), share(1.0, 0.5)]
    _, callback, _ = fit(folder, tmp_path, shares, steps=5, best="val/under_counted")
    assert (callback.best_step, callback.best_value) == (4, pytest.approx(0.2))
    _, callback, _ = fit(folder, tmp_path / "fid", shares, steps=5, best="val/fid")
    distances = {int(row["step"]): float(row["val/fid"]) for row in rows_of(tmp_path / "fid") if row["val/fid"]}
    assert callback.best_value == min(distances.values()) and callback.best_step == min(distances, key=distances.get)


def test_a_resumed_run_remembers_the_best_and_the_base(folder, tmp_path):
    _, _, trainer = fit(folder, tmp_path / "a", [share(1.0, 1.0)], steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, callback, _ = fit(folder, tmp_path / "a", [share(1.0, 0.3)], steps=4, ckpt=tmp_path / "two.ckpt")
    assert callback.best_step == 2 and callback.best_value == 1.0 and callback.base["val/counting"] == 0.5


def test_a_finished_run_that_is_resumed_still_ends_with_its_best_and_last_is_the_last(folder, tmp_path):
    """Killed between training and evaluation, with three steps of five judged."""
    shares = [share(1.0, 0.8), share(1.0, 0.2), share(0.9, 0.5)]
    whole, _, _ = fit(folder, tmp_path, shares, steps=5, every=2)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert last["global_step"] == 5 and not torch.equal(last["state_dict"]["bank.tokens"], best["bank.tokens"])
    (tmp_path / "soft_tokens.safetensors").unlink()
    again, callback, _ = fit(folder, tmp_path, [], steps=5, every=2, ckpt=tmp_path / "checkpoints" / "last.ckpt")
    assert callback.best_step == 2
    for method in (whole, again):
        assert torch.equal(method.bank.tokens, best["bank.tokens"])
    assert torch.equal(SoftTokens.load(tmp_path / "soft_tokens.safetensors").tokens, best["bank.tokens"])


def test_a_run_that_is_stopped_in_its_last_step_has_judged_that_step_too(folder, tmp_path):
    with pytest.raises(SIGTERMException):
        fit(folder, tmp_path, [share(1.0, 0.3), share(1.0, 0.8)], steps=3, every=1, stop_at=3)
    _, callback, _ = fit(folder, tmp_path, [], steps=3, every=1, ckpt=tmp_path / "checkpoints" / "last.ckpt")
    assert (callback.best_step, callback.best_value) == (3, pytest.approx(0.9))


def test_a_run_resumed_into_another_folder_chooses_among_what_comes_now(folder, tmp_path):
    fit(folder, tmp_path / "a", [share(1.0, 1.0)], steps=2, every=2)
    made = fit(folder, tmp_path / "b", [share(1.0, 0.3)], steps=4, ckpt=tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert made[1].best_step == 4


def test_an_unmeasured_metric_cannot_choose(folder, tmp_path):
    with pytest.raises(UserError, match="val/clip was not measured"):
        fit(folder, tmp_path, [share(1.0, 1.0)], steps=2, best="val/clip")


def test_frechet_distance_is_that_of_two_gaussians():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 3))
    a, b = rng.normal(size=(400, 3)) @ mixing + 1.0, rng.normal(size=(500, 3)) * [1.0, 2.0, 0.5]
    first, second = np.cov(a.T), np.cov(b.T)
    roots = np.linalg.eigvals(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * np.sqrt(np.maximum(roots, 0)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    for wrong in (a[:1], a[:, :2]):
        with pytest.raises(ValueError, match="Frechet"):
            frechet_distance(wrong, b)


def test_reference_features_are_of_right_pictures():
    benchmark = Shapes(tasks=TASKS, prompts_per_task=5, split="validation")
    features = benchmark.reference_features(40)
    assert features.shape == (40, 192) and benchmark.reference_features(40) is features


class ThirdOfPixels(torch.nn.Module):
    """Stands where torchmetrics puts Inception: 2048 numbers of a uint8 picture."""

    def __init__(self, name, features_list, weights):
        super().__init__()
        assert (name, features_list, weights) == ("inception-v3-compat", ["2048"], None)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        return pixels.flatten(1)[:, :2048].float()


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr("t2i_rl.evaluation.inception.find_spec", lambda name: True)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", ThirdOfPixels)


def test_inceptions_features_are_of_the_folders_pictures_scaled_and_cropped(tmp_path, inception):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "captions.txt").write_text("not a picture")
    found = InceptionFeatures(str(tmp_path), size=32, batch_size=2, device="cpu")
    expected = pictures.transpose(0, 3, 1, 2).reshape(5, -1)[:, :2048].astype(float)
    np.testing.assert_array_equal(found.features(pictures), expected)
    np.testing.assert_array_equal(found.reference_features(), expected)
    Image.fromarray(np.concatenate([pictures[0]] * 2)).save(tmp_path / "5.png")
    (tmp_path / "6.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="6.png"):
        InceptionFeatures(str(tmp_path), size=32, device="cpu").reference_features()


class HeldOut(FourPairs):
    validation = tuple(Prompt(str(i), "a red circle") for i in range(4))


class Corners:
    """Features and real pictures from elsewhere, such as Inception's."""

    def features(self, images):
        return images.reshape(len(images), -1)[:, :3].astype(float)

    def reference_features(self):
        return np.random.default_rng(0).normal(size=(50, 3))


@pytest.mark.parametrize(("fid", "measured"), [(Corners(), {"val/bright", "val/fid"}), (None, {"val/bright"})])
def test_pictures_without_a_benchmark_are_those_held_back_from_training(tmp_path, folder, fid, measured):
    images = np.random.default_rng(1).integers(0, 255, (4, 8, 8, 3)).astype(np.uint8)
    method = SoftREPA(
        SD3(folder, max_sequence_length=2), partial(torch.optim.SGD, lr=1.0), temperature=1.0, pairs_per_pass=4
    )
    method.model.generate = lambda prompts, seeds, mode, fresh: Generation(images)
    callback = Validate(str(tmp_path), None, {"bright": Brightness()}, fid=fid, best=None)
    trainer_with([callback], tmp_path, 1).fit(method, HeldOut())
    last = next(row for row in rows_of(tmp_path) if row.get("val/bright"))
    assert {name for name in last if name.startswith("val/")} == measured
    assert float(last["val/bright"]) == pytest.approx(np.mean([image.mean() for image in images]), rel=1e-6)
    if fid is not None:
        expected = frechet_distance(fid.features(images), fid.reference_features())
        assert float(last["val/fid"]) == pytest.approx(expected)


class Plain(Shapes):
    """With nothing beside its verdicts, and no right pictures to compare with."""

    columns = ()

    def reference_features(self):
        return None


def test_a_frechet_distance_is_taken_where_there_are_references_and_refused_where_it_is_demanded_without(tmp_path):
    plain = Plain(tasks=TASKS, prompts_per_task=1)
    with pytest.raises(UserError, match="x.fid=true compares with reference_features.*Plain has none: set x.fid=false"):
        Validate(str(tmp_path), plain, fid=True).check("x")
    with pytest.raises(UserError, match="x.fid=true .* there is no benchmark"):
        Validate(str(tmp_path), None, fid=True, best=None).check("x")
    Validate(str(tmp_path), plain).check("x")
    with pytest.raises(UserError, match="choose from val/overall, val/score, val/counting, val/single_object, or null"):
        Validate(str(tmp_path), plain, best="val/fid").check("x")
    Validate(str(tmp_path), Shapes(tasks=TASKS, prompts_per_task=1), best="val/fid").check("x")
    with pytest.raises(UserError, match="val/fid is not measured"):
        Validate(str(tmp_path), Shapes(tasks=TASKS, prompts_per_task=1), fid=False, best="val/fid").check("x")


def test_what_inception_needs_is_said_before_anything_is_drawn(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a folder of pictures"):
        InceptionFeatures(str(tmp_path))
    for number in range(2):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr("t2i_rl.evaluation.inception.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -c constraints.txt torch-fidelity"):
        InceptionFeatures(str(tmp_path))
    monkeypatch.setattr("t2i_rl.evaluation.inception.find_spec", lambda name: True)
    with pytest.raises(UserError, match="no such file"):
        InceptionFeatures(str(tmp_path), weights=str(tmp_path / "weights.pth"))


def test_a_resume_keeps_what_was_validated_at_its_checkpoint(tmp_path):
    """With two optimizer steps a batch the checkpoint is of batch 2 and step 4.

    The row of step 4 was there before it.
    """
    loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": {"processed": 2}}}}
    torch.save({"loops": loops, "global_step": 4}, tmp_path / "last.ckpt")
    rows = ["loss,step,val/right", "1.0,0,", ",2,0.5", "0.9,1,", ",4,0.6", "0.8,2,", ",6,0.7"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    csv_logger(str(tmp_path), str(tmp_path / "last.ckpt"))
    assert (tmp_path / "metrics.csv").read_text().split() == rows[:5]
