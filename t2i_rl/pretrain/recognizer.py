"""Train the differentiable recogniser on scenes that are slightly blurred, noised and tinted, as drawings are."""

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F

from t2i_rl.evaluation.stats import wilson
from t2i_rl.pretrain.measure import contents, held_back_scenes
from t2i_rl.pretrain.streams import NumberedBatches
from t2i_rl.rewards.pixels import to_unit
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.recognizer import COLOR_NAMES, Recognizer, cells_of
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import LARGE_SHAPES


class LabelledScenes(NumberedBatches):
    """Batches `(pixels, present, shape, color)`; batch `i` is a function of `(seed, i)`."""

    def __init__(self, batch_size: int, seed: int, first: int = 0):
        super().__init__(first)
        self.batch_size, self.seed = batch_size, seed

    def batch(self, number: int) -> tuple[torch.Tensor, ...]:
        rng = np.random.default_rng((self.seed, 6, number))
        scenes = [sample_example(rng)[1] for _ in range(self.batch_size)]
        cells = [torch.stack(part) for part in zip(*map(cells_of, scenes), strict=True)]
        return worn(to_unit(np.stack([render(scene) for scene in scenes])), rng), *cells


def worn(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Pictures as a model might draw them: each blurred by up to a pixel, tinted and noised a little."""
    share = torch.from_numpy(rng.random((len(pixels), 1, 1, 1))).float()
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = torch.from_numpy(rng.normal(0, 0.02, (len(pixels), 3, 1, 1))).float()
    noise = (
        torch.from_numpy(rng.normal(0, 0.03, pixels.shape)).float()
        * torch.from_numpy(rng.random((len(pixels), 1, 1, 1))).float()
    )
    return (pixels + share * (blurred - pixels) + tint + noise).clamp(0, 1)


class RecognizerStage(L.LightningModule):
    """Binary cross-entropy of centres, cross-entropy of shape and colour where there is one; AdamW, one cycle."""

    def __init__(self, recognizer: Recognizer, lr: float = 2e-3):
        super().__init__()
        self.recognizer, self.lr = recognizer.train(), lr

    def training_step(self, batch, index: int) -> torch.Tensor:
        pixels, present, shape, color = batch
        centers, shapes, colors = self.recognizer(pixels)
        loss = F.binary_cross_entropy_with_logits(
            centers.float(), present, pos_weight=torch.tensor(4.0, device=self.device)
        )
        loss = loss + F.cross_entropy(shapes.float().flatten(0, 1), shape.flatten())
        loss = loss + F.cross_entropy(colors.float().flatten(0, 1), color.flatten())
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.trainer.max_steps, pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def read(recognizer: Recognizer, pixels: torch.Tensor) -> list[list[str]]:
    """The objects of each picture by the recogniser, as `measure.contents` writes them."""
    present, shape, color = recognizer(pixels)
    return [
        sorted(
            f"{COLOR_NAMES[color[row, cell].argmax()]} {LARGE_SHAPES[shape[row, cell].argmax()]}"
            for cell in (present[row] > 0).nonzero()[:, 0]
        )
        for row in range(len(pixels))
    ]


def agreement(recognizer: Recognizer, count: int = 1000, seed: int = 1) -> dict:
    """Share of held-back renders that it reads as they are, with Wilson's interval."""
    scenes = held_back_scenes(count, seed)
    found = read(recognizer, to_unit(np.stack([render(scene) for scene in scenes])))
    return wilson(sum(a == contents(scene.objects) for a, scene in zip(found, scenes, strict=True)), count)
