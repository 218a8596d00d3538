"""Making the tiny models: rows whatever the number of workers, stages that end by the clock, going on from weights."""

from functools import partial
from itertools import islice
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from t2i_rl.core.errors import UserError
from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.janus_tiny import build_processor
from t2i_rl.pretrain.denoiser import CaptionedScenes
from t2i_rl.pretrain.fit import EndsByTheClock, fit, share_of_minutes
from t2i_rl.pretrain.janus_lm import PretrainRows
from t2i_rl.pretrain.one_step import TaughtPairs
from t2i_rl.pretrain.recognizer import LabelledScenes
from t2i_rl.pretrain.vae import VAEStage
from t2i_rl.pretrain.vq import SceneImages
from t2i_rl.shapes.examples import TASK_WEIGHTS
from t2i_rl.tasks.pretrain import train
from tests.support.commands import composed
from tests.support.small_diffusers import small_vae
from tests.support.tiny import CHAT

WEIGHTS = Path(__file__).parents[2] / "t2i_rl" / "weights"
TOKENIZER = build_processor().tokenizer
STREAMS = {
    "scenes": partial(SceneImages, 2, 0),
    "captions": partial(CaptionedScenes, 2, TASK_WEIGHTS, 0),
    "labels": partial(LabelledScenes, 2, 0),
    "rows": lambda first: PretrainRows(TOKENIZER, Chat.of(CHAT), (0, 2), first, {"draw": 2, "plan": 2, "look": 1}),
    "taught": partial(
        TaughtPairs, (8, 8, 8), torch.randn(3, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), 0
    ),
}


def flat(batch) -> list:
    """Everything that a batch holds, as plain numbers and texts."""
    if isinstance(batch, torch.Tensor):
        return batch.flatten().tolist()
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return [leaf for part in batch for leaf in flat(part)]
    return flat(list(vars(batch).values())) if hasattr(batch, "__dict__") else [batch]


@pytest.mark.parametrize("name", STREAMS)
def test_rows_and_their_order_are_the_same_whatever_the_number_of_workers(name):
    def first_batches(first: int, workers: int) -> list:
        loader = DataLoader(STREAMS[name](first), batch_size=None, num_workers=workers)
        return [flat(batch) for batch in islice(loader, 5)]

    alone = first_batches(3, 0)
    assert first_batches(3, 2) == first_batches(3, 3) == alone
    assert first_batches(5, 2)[:3] == alone[2:] and alone[0] != alone[1]


def test_a_stage_learns_the_same_with_workers(tmp_path):
    stages = {}
    for workers in (0, 2):
        L.seed_everything(0, verbose=False)
        stages[workers] = VAEStage(small_vae())
        fit(stages[workers], STREAMS["scenes"], 3, tmp_path / str(workers), "32-true", workers=workers)
    weights = [list(stage.parameters()) for stage in stages.values()]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


class Counts(L.LightningModule):
    """Two optimizers, as the stages of the models have; writes down how far it thinks that it has come."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weights = torch.nn.Parameter(torch.zeros(1))
        self.left = []

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward((self.weights - 1).square().sum())
            optimizer.step()
        self.left.append(1 - self.trainer.global_step / self.trainer.max_steps)

    def configure_optimizers(self):
        return [torch.optim.SGD([self.weights], lr=0.01) for _ in range(2)]


def test_a_stage_with_minutes_ends_in_time_with_its_rates_down_and_is_not_begun_again(tmp_path):
    stage = Counts()
    minutes = fit(stage, lambda first: torch.zeros(10**5, 1), 10**5, tmp_path, "32-true", 2, minutes=0.03)
    assert 0.03 <= minutes < 0.1 and EndsByTheClock.WARM < len(stage.left) < 10**5
    assert stage.left[0] > 0.99 and stage.left[-1] < 0.05  # what a rate falls with
    again = Counts()
    assert fit(again, lambda first: torch.zeros(9, 1), 10**5, tmp_path, "32-true", 2, minutes=0.03) == minutes
    assert not again.left and torch.equal(again.weights, stage.weights)


def test_a_stage_whose_steps_are_over_before_its_minutes_takes_all_of_them_and_no_more(tmp_path):
    stage = Counts()
    fit(stage, lambda first: torch.zeros(100, 1), 30, tmp_path, "32-true", 2, minutes=5)
    assert len(stage.left) == 30 and stage.left[-1] == 0


def test_stages_share_minutes_as_they_share_steps():
    assert share_of_minutes(None, 1, 4) is None and share_of_minutes(10.0, 1, 4) == 2.5


def test_going_on_from_weights_keeps_the_autoencoder_and_moves_the_rest(tmp_path):
    small = ["denoiser.steps=2", "denoiser.batch_size=2", "denoiser.precision=32-true", "denoiser.optimizer.warmup=1"]
    cfg = composed(
        "task=pretrain",
        "model=sd_tiny",
        f"paths.output_dir={tmp_path}",
        f"task.initial_weights={WEIGHTS / 'sd_tiny'}",
        "task.minutes=1",
        "task.workers=1",
        *(f"++task.recipes.sd_tiny.{setting}" for setting in small),
    )
    model, _ = train(cfg)
    assert model.path == str(tmp_path / "sd_tiny") and not (tmp_path / "vae").exists()
    for part, stays in (("vae", True), ("unet", False), ("text_encoder", False)):
        (before,), (after,) = ((folder / "sd_tiny" / part).glob("*.safetensors") for folder in (WEIGHTS, tmp_path))
        before, after = load_file(before), load_file(after)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before) == stays


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["task.minutes=3"], "give task.initial_weights=<folder>"),
        (["task.workers=-1"], "task.workers must be a whole number"),
        (["task.minutes=0", "task.initial_weights=x"], "task.minutes must be a number above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_loads(given, said):
    with pytest.raises(UserError, match=said):
        train(composed("task=pretrain", "model=sd_tiny", *given))
