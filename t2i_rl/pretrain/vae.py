"""Stage 1 of sd_tiny and sd3_tiny: the autoencoder, on rendered scenes."""

import lightning as L
import torch
import torch.nn.functional as F

from t2i_rl.core.finite import check_finite


class VAEStage(L.LightningModule):
    """Reconstruction + `kl_weight` times the KL of the posterior to a unit Gaussian (Kingma and Welling 2014).

    The KL is in nats an element.
    """

    def __init__(self, vae, lr: float = 2e-3, kl_weight: float = 1e-3):
        super().__init__()
        self.vae, self.lr, self.kl_weight = vae.train(), lr, kl_weight

    def training_step(self, pixels: torch.Tensor, index: int) -> torch.Tensor:
        posterior = self.vae.encode(pixels).latent_dist
        output = self.vae.decode(posterior.sample()).sample.float()
        reconstruction = F.l1_loss(output, pixels) + 4 * F.mse_loss(output, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"vae/reconstruction": reconstruction.detach(), "vae/kl": kl.detach()}, prog_bar=True)
        return reconstruction + self.kl_weight * kl

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.trainer.max_steps, pct_start=0.05
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def set_scale(vae, batches: list[torch.Tensor], shift: bool) -> None:
    """Write into the config what makes sampled latents of unit variance (and, with `shift`, of mean zero).

    Raises:
        UserError: the latents are not finite.
    """
    latents = torch.cat([vae.encode(pixels).latent_dist.sample() for pixels in batches]).float()
    check_finite(latents, "the autoencoder's latents", "its stage ran away; train it again at a lower rate")
    offset = float(latents.mean()) if shift else 0.0
    vae.register_to_config(
        scaling_factor=1 / float((latents - offset).square().mean().sqrt()), shift_factor=offset if shift else None
    )
