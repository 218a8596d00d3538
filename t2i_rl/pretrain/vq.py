"""Stage 1 of janus_tiny: the VQ autoencoder, on rendered scenes."""

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F

from t2i_rl.pretrain.streams import NumberedBatches
from t2i_rl.shapes.examples import sample_example
from t2i_rl.shapes.render import render, to_pixels


class SceneImages(NumberedBatches):
    """Batches of rendered training scenes, float32 `(B, 3, H, W)` in [-1, 1].

    Batch `i` is a function of `(seed, i)`.
    """

    def __init__(self, batch_size: int, seed: int, first: int = 0):
        super().__init__(first)
        self.batch_size, self.seed = batch_size, seed

    def batch(self, number: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, 1, number))
        return to_pixels(np.stack([render(sample_example(rng)[1]) for _ in range(self.batch_size)]))


class VQStage(L.LightningModule):
    """Reconstruction + commitment (van den Oord et al. 2017, appendix A.1; ViT-VQGAN's normalisation).

    The codebook follows an exponential mean of its members on the unit sphere, and a code that
    nobody uses is moved onto a random encoding.
    """

    def __init__(
        self, vqmodel, lr: float = 2e-3, decay: float = 0.97, commitment: float = 0.25, revive_every: int = 50
    ):
        super().__init__()
        self.vqmodel = vqmodel.train()
        self.lr, self.decay, self.commitment, self.revive_every = lr, decay, commitment, revive_every
        codebook = vqmodel.quantize.embedding.weight
        codebook.requires_grad_(False)
        codebook.copy_(F.normalize(torch.randn_like(codebook), dim=1))
        self.register_buffer("counts", torch.ones(len(codebook)))
        self.register_buffer("sums", codebook.clone())

    def training_step(self, pixels: torch.Tensor, index: int) -> torch.Tensor:
        model = self.vqmodel
        z = F.normalize(model.quant_conv(model.encoder(pixels)).float(), dim=1).permute(0, 2, 3, 1)
        flat = z.reshape(-1, z.shape[-1])
        ids = (flat @ model.quantize.embedding.weight.T).argmax(-1)
        codes = model.quantize.embedding(ids).view_as(z)
        quantized = (z + (codes - z).detach()).permute(0, 3, 1, 2)
        output = model.decoder(model.post_quant_conv(quantized)).float()
        reconstruction = F.l1_loss(output, pixels) + 4 * F.mse_loss(output, pixels)
        commitment = F.mse_loss(z, codes)
        self._move_codes(flat.detach(), ids, index)
        self.log_dict({"vq/reconstruction": reconstruction, "vq/codes": float(ids.unique().numel())}, prog_bar=True)
        return reconstruction + self.commitment * commitment

    @torch.no_grad()
    def _move_codes(self, flat: torch.Tensor, ids: torch.Tensor, index: int) -> None:
        self.counts.mul_(self.decay).index_add_(0, ids, torch.full_like(ids, 1 - self.decay, dtype=torch.float))
        self.sums.mul_(self.decay).index_add_(0, ids, (1 - self.decay) * flat)
        if self.global_step < 0.7 * self.trainer.max_steps and index % self.revive_every == self.revive_every - 1:
            dead = torch.where(self.counts < 0.05)[0]
            chosen = flat[torch.randint(len(flat), (len(dead),))]
            self.sums[dead], self.counts[dead] = chosen, 1.0
        self.vqmodel.quantize.embedding.weight.copy_(F.normalize(self.sums, dim=1))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.trainer.max_steps, pct_start=0.05
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
