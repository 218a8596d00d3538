"""Which parameters learn: those that a pattern names, or adapters on them."""

import re
from collections.abc import Mapping, Sequence

import torch
from omegaconf import DictConfig
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.models.autoregressive.janus import Janus

# what peft can add to a layer beside two matrices, and rollouts do not merge
NOT_MERGED = (
    *("use_dora", "lora_bias", "use_qalora", "modules_to_save", "trainable_token_indices", "target_parameters"),
    "layer_replication",
)


def lora_config(lora: Mapping | None) -> LoraConfig:
    """peft's settings of adapters.

    Raises:
        UserError: peft has no such setting, or not this value of it.
    """
    try:
        return LoraConfig(**(lora or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"method.lora: {error}") from error


def check_lora(lora: Mapping | None) -> None:
    """Refuse what is no setting of peft's LoraConfig, or more than what rollouts merge.

    Raises:
        UserError: one line that names it.
    """
    config = lora_config(lora)
    beyond = [name for name in NOT_MERGED if getattr(config, name, None)]
    if beyond:
        raise UserError(f"method.lora.{beyond[0]}: rollouts merge plain LoRA (and rsLoRA) only; leave it out")


def check_trainable(patterns: Sequence[str]) -> None:
    """Refuse what names no parameter.

    Raises:
        UserError: there is no pattern, or one is no regular expression.
    """
    if not patterns:
        raise UserError("method.trainable must hold one regular expression or more: nothing would learn")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"method.trainable: {pattern!r} is no regular expression ({error})") from error


def select_trainable(model: nn.Module, patterns: Sequence[str], lora: dict | None) -> None:
    """Freeze everything but the parameters whose name matches one of `patterns` (regular expressions, from the start of
    the name); with `lora` (peft's LoraConfig arguments) freeze those too and train adapters on them instead.

    Raises:
        UserError: a pattern matches nothing.
    """
    model.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.match(pattern, name) for name in names):
            raise UserError(f"method.trainable: {pattern!r} matches no parameter; names look like {names[0]}")
    if lora is not None:
        targets = _lora_targets(model, patterns, lora.get("target_modules") or [r".*"])
        add_adapters(model, lora_config({**lora, "target_modules": targets}))
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_matches(patterns, name))


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put LoRA adapters into a frozen model, which learn in float32 whatever they are added to."""
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _lora_targets(model: nn.Module, patterns: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Linear layers of the parts that train, of those that are asked for."""
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and _matches(patterns, f"{name}.weight")
        and any(re.search(pattern, name) for pattern in asked)
    ]
    if not targets:
        raise UserError(f"method.lora.target_modules: {list(asked)} matches no linear layer among the trainable parts")
    return targets


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def refuse_rounded_updates(model: nn.Module) -> None:
    """A weight in bfloat16 changes by 1/256 of itself or not at all, so a small learning rate would train nothing.

    Raises:
        UserError: a parameter that learns is in half precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{name} would learn in {dtype}, which rounds small updates away: set model.dtype=float32 with "
                "trainer.precision=bf16-mixed, or method.lora={r: 16}"
            )


def check_dtype(cfg: DictConfig) -> None:
    """The same of a config, before any weight loads.

    Raises:
        UserError: weights would learn in half precision.
    """
    half = cfg.model.get("dtype") in ("bfloat16", "float16")
    if half and "lora" in cfg.method and cfg.method.lora is None:
        raise UserError(
            f"model.dtype={cfg.model.dtype} rounds small updates away: set model.dtype=float32 with "
            "trainer.precision=bf16-mixed and model.rollout.dtype=bfloat16, or train adapters (method=iris_lora, or "
            "method.lora={r: 16})"
        )


def recompute_layers(model: Janus) -> None:
    """Let a model keep only the inputs of its blocks for the backward pass, and compute the rest again.

    Args:
        model: an adapter of family `autoregressive`.
    """
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in model.blocks():
        block.training = True  # of the block alone: it is what transformers asks before it checkpoints
