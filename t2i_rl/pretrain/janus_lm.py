"""Stage 2 of janus_tiny: one language model that writes plans, draws images, and says what it sees."""

from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F

from t2i_rl.models.autoregressive.chat import Chat
from t2i_rl.models.autoregressive.codes import nearest_codes
from t2i_rl.models.autoregressive.engine.rows import positions, unconditional
from t2i_rl.models.autoregressive.janus import special_ids
from t2i_rl.pretrain.streams import NumberedBatches
from t2i_rl.shapes.examples import misremembered, sample_example
from t2i_rl.shapes.render import render, to_pixels
from t2i_rl.shapes.text import plan

LOOK = "describe the picture."


@dataclass
class Rows:
    """Left-padded prompts with right-padded text targets, or with the pixels to draw or to look at."""

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor | None = None
    pixels: torch.Tensor | None = None

    def to(self, device):
        return Rows(
            *(None if part is None else part.to(device) for part in (self.ids, self.mask, self.targets, self.pixels))
        )


class PretrainRows(NumberedBatches):
    """Endless batches `{draw, plan, look}`.

    Batch `i` is a function of `(seed, i)`, so a resumed run continues the stream. Of the images to
    draw, `direct_share` come without a plan and `dropped_share` with the unconditional prompt; of
    the plans to write, `slip_share` get one object wrong. `sizes` says how many rows of each kind a
    batch has.
    """

    def __init__(
        self,
        tokenizer,
        chat: Chat,
        seed: tuple[int, ...],
        first: int,
        sizes: dict[str, int],
        direct_share: float = 0.3,
        dropped_share: float = 0.1,
        slip_share: float = 0.0,
    ):
        super().__init__(first)
        self.tokenizer, self.chat, self.seed, self.sizes = tokenizer, chat, seed, sizes
        self.direct_share, self.dropped_share, self.slip_share = direct_share, dropped_share, slip_share
        self.special = special_ids(tokenizer)

    def batch(self, number: int) -> dict[str, Rows]:
        makers = {"draw": self._draw, "plan": self._plan, "look": self._look}
        rng = np.random.default_rng((*self.seed, number))
        return {name: makers[name](rng) for name in self.sizes}

    def _draw(self, rng) -> Rows:
        texts, images = [], []
        for _ in range(self.sizes["draw"]):
            prompt, scene = sample_example(rng)
            texts.append(self.chat.image(prompt.text, "" if rng.random() < self.direct_share else plan(scene, rng)))
            images.append(render(scene))
        ids, mask = self._left([self.tokenizer(text).input_ids + [self.special["boi"]] for text in texts])
        dropped = torch.from_numpy(rng.random(len(ids)) < self.dropped_share)
        ids[dropped] = torch.where(mask[dropped] == 1, unconditional(ids[dropped], self.special), ids[dropped])
        return Rows(ids, mask, pixels=to_pixels(np.stack(images)))

    def _plan(self, rng) -> Rows:
        asked, answers = [], []
        for _ in range(self.sizes["plan"]):
            prompt, scene = sample_example(rng)
            asked.append(self.tokenizer(self.chat.plan(prompt.text)).input_ids)
            written = misremembered(scene, rng) if rng.random() < self.slip_share else scene
            answers.append(self._answer(plan(written, rng)))
        return Rows(*self._left(asked), targets=self._right(answers))

    def _look(self, rng) -> Rows:
        images, answers = [], []
        for _ in range(self.sizes["look"]):
            scene = sample_example(rng)[1]
            images.append(render(scene))
            answers.append(self._answer(plan(scene)))
        asked = look_ids(self.tokenizer, self.special, (images[0].shape[0] // 4) ** 2)
        return Rows(
            *self._left([asked] * len(images)), targets=self._right(answers), pixels=to_pixels(np.stack(images))
        )

    def _answer(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.special["eos"]]

    def _left(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([[self.special["pad"]] * (width - len(row)) + row for row in rows])
        return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def _right(self, rows: list[list[int]]) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [-100] * (width - len(row)) for row in rows])


def look_ids(tokenizer, special: dict[str, int], image_tokens: int) -> list[int]:
    """The conversation that shows an image and asks what it holds, with `image_tokens` placeholders."""
    before = tokenizer("<|User|>:").input_ids + [special["boi"]] + [special["image"]] * image_tokens + [special["eoi"]]
    return before + tokenizer(f"{LOOK}\n\n<|Assistant|>:", add_special_tokens=False).input_ids


class JanusLMStage(L.LightningModule):
    """Next-token cross-entropy of image codes, plans and descriptions.

    The generation head learns codes, the language head texts; the VQ model is frozen. Matrices of
    the language trunk are trained by Muon, everything else by AdamW; the rate is flat, then falls
    linearly to zero.
    """

    optimizer_count = 2  # Lightning counts a step for each

    def __init__(self, model, lr: float = 3e-3, muon_lr: float = 3e-3, cooldown: float = 0.4, warmup: int = 100):
        super().__init__()
        self.model = model
        self.automatic_optimization = False
        self.lr, self.muon_lr, self.cooldown, self.warmup = lr, muon_lr, cooldown, warmup
        model.train()
        model.model.vqmodel.eval().requires_grad_(False)

    def training_step(self, batch: dict[str, Rows], index: int) -> None:
        losses = {}
        if "draw" in batch:
            losses["image_nll"] = self._image_loss(batch["draw"])
        if "plan" in batch:
            losses["plan_nll"] = self._text_loss(batch["plan"], self.model.get_input_embeddings()(batch["plan"].ids))
        if "look" in batch:
            losses["look_nll"] = self._text_loss(batch["look"], self._look_embeds(batch["look"]))
        self.manual_backward(sum(value * (1.0 if name == "image_nll" else 0.3) for name, value in losses.items()))
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.log_dict({name: float(value.detach()) for name, value in losses.items()}, prog_bar=True)

    def _image_loss(self, rows: Rows) -> torch.Tensor:
        model = self.model
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            codes = nearest_codes(model.model.vqmodel, rows.pixels)
        drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])
        embeds = torch.cat([model.get_input_embeddings()(rows.ids), drawn.to(self.model.lm_head.weight.dtype)], dim=1)
        hidden = self._trunk(embeds, torch.cat([rows.mask, torch.ones_like(codes[:, :-1])], dim=1), codes.shape[1])
        return F.cross_entropy(model.model.generation_head(hidden).float().flatten(0, 1), codes.flatten())

    def _text_loss(self, rows: Rows, embeds: torch.Tensor) -> torch.Tensor:
        inputs = rows.targets[:, :-1]
        answer = self.model.get_input_embeddings()(inputs.clamp(min=0))
        mask = torch.cat([rows.mask, (inputs >= 0).long()], dim=1)
        hidden = self._trunk(torch.cat([embeds, answer], dim=1), mask, rows.targets.shape[1])
        return F.cross_entropy(
            self.model.lm_head(hidden).float().flatten(0, 1), rows.targets.flatten(), ignore_index=-100
        )

    def _look_embeds(self, rows: Rows) -> torch.Tensor:
        embeds = self.model.get_input_embeddings()(rows.ids)
        seen = self.model.model.get_image_features(rows.pixels).pooler_output.to(embeds.dtype)
        return embeds.masked_scatter((rows.ids == self.model.config.image_token_id).unsqueeze(-1), seen)

    def _trunk(self, embeds: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        output = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        return output.last_hidden_state[:, -length:]

    def configure_optimizers(self):
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trainable if "language_model.layers" in name and p.ndim == 2]
        chosen = set(map(id, matrices))
        others = [p for _, p in trainable if id(p) not in chosen]
        optimizers = [
            torch.optim.Muon(matrices, lr=self.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate) for optimizer in optimizers]

    def _rate(self, step: int) -> float:
        total = self.trainer.max_steps // self.optimizer_count
        left = (total - step) / (self.cooldown * total)
        return min(1.0, (step + 1) / self.warmup, max(left, 0.0))


class JanusLookStage(JanusLMStage):
    """A last stage for the eyes, in which only the understanding tower and its aligner learn.

    Drawing and writing stay as they are.
    """

    optimizer_count = 1

    def training_step(self, batch: dict[str, Rows], index: int) -> None:
        look = batch["look"]
        loss = self._text_loss(look, self._look_embeds(look))
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizers().step()
        self.optimizers().zero_grad()
        self.lr_schedulers().step()
        self.log("look_nll", float(loss.detach()), prog_bar=True)

    def configure_optimizers(self):
        self.model.requires_grad_(False)
        eyes = [*self.model.model.vision_model.parameters(), *self.model.model.aligner.parameters()]
        optimizer = torch.optim.AdamW(
            [p.requires_grad_(True) for p in eyes], lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)]
