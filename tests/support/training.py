"""Short training runs that leave nothing behind, and an optimizer that shows the gradients it was given."""

import lightning as L
import torch


class Keep(torch.optim.SGD):
    """Keeps the gradients of the last step, in the order of its parameters, and moves nothing."""

    def step(self, closure=None):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        self.gradients = [None if gradient is None else gradient.clone() for gradient in gradients]


def quiet_trainer(steps: int, ranks: int = 1, **settings) -> L.Trainer:
    """On the CPU; several ranks are spawned processes."""
    return L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_spawn" if ranks > 1 else "auto",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def gradients_of(module: L.LightningModule, trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """What the last step of a module trained with `Keep` followed, by name."""
    kept = trainer.optimizers[0].gradients
    return {name: value for (name, _), value in zip(module.learning(), kept, strict=True) if value is not None}
