"""What a method keeps in a checkpoint and takes from one: exactly what learns, and a part that says what the checkpoint
is."""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from peft.tuners.lora import LoraLayer
from torch import nn

from t2i_rl import __version__
from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.contracts import Drawn
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import RAN_AWAY, check_checkpoint
from t2i_rl.core.recipes import plain
from t2i_rl.methods.identity import ABOUT, FORMAT, about, own_part


class Method(L.LightningModule):
    """A method, as the command line and the tasks see its class.

    trains: families of models that it takes.
    learns_from: what its data module `gives`.
    draws: what its rollouts give a reward to read, see `contracts.Reward.reads`.
    draws_in_turns: whether it thinks, draws, reflects and draws again.
    searches_noise: whether it looks for better noise, prompt by prompt, and trains no weight.
    needs_gradients: whether a reward must be differentiable.
    """

    trains: frozenset[str] = frozenset()
    learns_from: str = "prompts"
    draws: type[Drawn] = Drawn
    draws_in_turns: bool = False
    searches_noise: bool = False
    needs_gradients: bool = False

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Refuse options, by name as in `__init__`, that cannot work; the command line asks before any weight loads.

        Raises:
            UserError: one line that names the option and its choices.
        """


class Learner(Method):
    """A method that learns. A subclass says under which key its own state is kept, what that is, and which settings
    decide what learns."""

    keeps_as = ""
    decide_what_learns: tuple[str, ...] = ("trainable", "lora")

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        # A checkpoint lacks what is frozen, which Lightning would refuse; `on_load_checkpoint` is stricter in its
        # place.
        self.strict_loading = False
        self.recipe: dict[str, Any] = {}  # see `recipes.recipe_of`; a method that no config made has none

    def learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, by name."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def kept_names(self) -> set[str]:
        """Names of what a checkpoint holds: everything else is the initial model, which it names by its hash."""
        return {name for name, _ in self.learning()}

    def state_dict(self, *args, **kwargs) -> dict:
        """See `kept_names`."""
        names = self.kept_names()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in names}

    def own_state(self) -> dict:
        """What this method keeps beside its weights; every rank calls it."""
        raise NotImplementedError

    def take_own_state(self, saved: dict) -> None:
        """Go on from what `own_state` returned.

        Raises:
            UserError: it was trained from other weights.
        """
        raise NotImplementedError

    def draw_as_trained(self) -> None:
        """Called once a checkpoint was loaded to draw with."""

    def facts(self) -> dict:
        """Settings that are known only once the model is there; they go into results.json and the checkpoint."""
        return {}

    def resolved_settings(self) -> dict:
        """Every setting of this method as it ran, those that only a signature gives among them."""
        return plain({**self.recipe.get("settings", {}), **self.facts()})

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint[ABOUT] = {
            "format": FORMAT,
            "version": __version__,
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "step": self.global_step,
            "adapters": adapters_of(self),
            **self.recipe,
            "settings": self.resolved_settings(),
        }
        checkpoint[self.keeps_as] = self.own_state()
        check_checkpoint(checkpoint, "what would be saved", RAN_AWAY)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Lightning calls it before it loads weights.

        Raises:
            UserError: the checkpoint is another method's, another model's, or holds other weights than learn here.
        """
        saved = own_part(checkpoint, self.keeps_as, type(self))
        check_checkpoint(checkpoint, "this checkpoint")
        self.take_own_state(saved)
        check_learns(self, checkpoint)

    def load(self, path: str) -> int:
        """Put a checkpoint's weights into the model, to draw with; returns the optimizer step it was saved at.

        Raises:
            UserError: it is no checkpoint of this method on this model.
        """
        checkpoint = read_checkpoint(path)
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=False)  # what is frozen is not in it: see check_learns
        self.draw_as_trained()
        return checkpoint["global_step"]

    @torch.no_grad()
    def restore(self, checkpoint: Mapping) -> None:
        """Put the weights of a checkpoint of this very run in the place of those that train.

        Raises:
            UserError: see `check_learns`.
        """
        check_learns(self, checkpoint)
        self.trainer.strategy.load_model_state_dict(checkpoint, strict=False)  # what is frozen is not in it


def check_learns(module: nn.Module, checkpoint: Mapping) -> None:
    """Whether a checkpoint holds exactly what learns here, adapters at the same strength among it.

    Raises:
        UserError: it does not; the line counts what fits.
    """
    shapes_here = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes_there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if shapes_here != shapes_there:
        fitting = len(shapes_here.items() & shapes_there.items())
        raise UserError(
            f"this checkpoint holds other weights than are trained here ({len(shapes_there)} tensors there, {len(shapes_here)} "
            f"here, {fitting} alike): "
            "give its run's method.trainable and method.lora"
        )
    strengths, here = about(checkpoint).get("adapters"), adapters_of(module)
    if strengths is None and here:
        rank_zero_only(print)(
            f"this checkpoint is older than the record of its adapters' strength: they count {min(here.values()):g} times, "
            "as method.lora says (lora_alpha / r), which must be that of its run",
            flush=True,
        )
    if strengths is not None and strengths != here:
        raise UserError(
            "this checkpoint's adapters were trained at another strength: give its run's method.lora (lora_alpha, "
            "use_rslora)"
        )


def adapters_of(module: nn.Module) -> dict[str, float]:
    """By how much each LoRA adapter is multiplied, which its weights do not tell."""
    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))
    return {name: float(layer.scaling["default"]) for name, layer in layers}
