"""Whether a checkpoint fits what learns here: the same weights, adapters at the same strength."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_only
from peft.tuners.lora import LoraLayer
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.methods.identity import about


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
            f"this checkpoint holds other weights than are trained here ({len(shapes_there)} tensors there, "
            f"{len(shapes_here)} here, {fitting} alike): give its run's method.trainable and method.lora"
        )
    strengths_here, strengths_there = adapters_of(module), about(checkpoint).get("adapters")
    if strengths_there is None and strengths_here:
        rank_zero_only(print)(
            "this checkpoint is older than the record of its adapters' strength: they count "
            f"{min(strengths_here.values()):g} times, as method.lora says (lora_alpha / r), which must be that of its "
            "run",
            flush=True,
        )
    if strengths_there is not None and strengths_there != strengths_here:
        raise UserError(
            "this checkpoint's adapters were trained at another strength: give its run's method.lora (lora_alpha, "
            "use_rslora)"
        )


def adapters_of(module: nn.Module) -> dict[str, float]:
    """By how much each LoRA adapter is multiplied, which its weights do not tell."""
    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))
    return {name: float(layer.scaling["default"]) for name, layer in layers}
