"""Which parameters learn, and the frozen model that the KL is taken to."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.numbers import LearningRate, check_value

NOT_MERGED = ("use_dora", "lora_bias", "use_qalora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")  # fmt: skip


def check_lora(lora: dict | None) -> None:
    """Refuse what is no setting of peft's LoraConfig, or more than what rollouts merge.

    Raises:
        UserError: one line that names it.
    """
    try:
        config = LoraConfig(**(lora or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"method.lora: {error}") from error
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


def check_optimizer(optimizer: partial, scheduler: partial | None) -> None:
    """Refuse options that torch's own classes refuse, and a rate at which weights would jump.

    Raises:
        UserError: what they say, or what the rate must be.
    """
    try:
        made = optimizer([nn.Parameter(torch.zeros(1))])
        if scheduler is not None:
            scheduler(made)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"method.optimizer or method.scheduler: {error}") from error
    check_value(made.defaults["lr"], LearningRate, "method.optimizer.lr")


class NonFinite:
    """What becomes of an optimizer step whose gradient is not finite: the run ends with a line (`raise`), or goes on
    without it (`skip`).

    Every rank decides alike. A skipped step changes no weight, no optimizer state and no schedule, and is counted; the
    next one has other data. `MOST_IN_A_ROW` of them end the run: then it is not a step that is broken but the weights.

    Raises:
        UserError: an unknown choice.
    """

    CHOICES = ("raise", "skip")
    MOST_IN_A_ROW = 10

    def __init__(self, choice: str):
        self.check(choice)
        self.choice, self.skipped, self.in_a_row = choice, 0, 0

    @classmethod
    def check(cls, choice: str) -> None:
        if choice not in cls.CHOICES:
            raise UserError(f"method.on_nonfinite must be one of {', '.join(cls.CHOICES)}, not {choice!r}")

    def allows(self, norm: torch.Tensor, step: int) -> bool:
        """Whether the optimizer may step with a gradient of this norm.

        Raises:
            UserError: it may not, and such steps are not skipped, or were too many in a row.
        """
        finite = torch.isfinite(norm.detach()).to(torch.int32)
        if dist.is_initialized():
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite:
            self.in_a_row = 0
            return True
        if self.choice == "raise":
            raise UserError(
                f"the gradient's norm is {norm.item()} at optimizer step {step}, and no weight was changed: go on "
                "from the last "
                "checkpoint with ckpt_path=last method.on_nonfinite=skip, which leaves such steps out and counts "
                "them, or lower "
                "method.optimizer.lr (docs/metrics.md)"
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= self.MOST_IN_A_ROW:
            raise UserError(
                f"the gradient was not finite in {self.in_a_row} steps in a row, up to optimizer step {step}: the "
                "weights themselves "
                "are past mending; go on from an earlier checkpoint (callbacks.checkpoint.keep_every_n_steps keeps "
                "them) with a "
                "lower method.optimizer.lr"
            )
        return False

    def metrics(self) -> dict[str, float]:
        """How many steps were left out so far, where they are left out."""
        return {"train/skipped_steps": float(self.skipped)} if self.choice == "skip" else {}


def select_trainable(model: nn.Module, patterns: list[str], lora: dict | None) -> None:
    """Freeze everything but the parameters whose name matches one of `patterns` (regular expressions, from the start of the name);
    with `lora` (peft's LoraConfig arguments) freeze those too and train adapters on them instead.

    Raises:
        UserError: a pattern matches nothing.
    """
    model.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.match(pattern, name) for name in names):
            raise UserError(f"method.trainable: {pattern!r} matches no parameter; names look like {names[0]}")
    if lora is not None:
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and _matches(patterns, f"{name}.weight")
        ]
        wanted = lora.get("target_modules") or [r".*"]
        targets = [name for name in targets if any(re.search(pattern, name) for pattern in wanted)]
        if not targets:
            raise UserError(
                f"method.lora.target_modules: {list(wanted)} matches no linear layer among the trainable parts"
            )
        inject_adapter_in_model(LoraConfig(**{**lora, "target_modules": targets}), model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # adapters learn in float32 whatever they are added to
                parameter.data = parameter.data.float()
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_matches(patterns, name))


def refuse_rounded_updates(model: nn.Module) -> None:
    """A weight in bfloat16 changes by 1/256 of itself or not at all, so a small learning rate would train nothing.

    Raises:
        UserError: a parameter that learns is in half precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"{name} would learn in {str(parameter.dtype).removeprefix('torch.')}, which rounds small updates away: set model.dtype=float32 "
                "with trainer.precision=bf16-mixed, or method.lora={r: 16}"
            )


def _matches(patterns: list[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


class Reference:
    """The model as it was before training: its adapters switched off under LoRA, else a frozen copy with embeddings of its own.

    Deliberately no submodule of whatever holds it: it is neither trained, nor wrapped, nor saved; checkpoints carry its hash.
    `offload` keeps the copy in the CPU's memory while it is not scoring.
    """

    def __init__(self, model: nn.Module, offload: bool = False):
        self.adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.sha256 = weights_sha256(model, adapters=False)
        self.twin, self.offload = None if self.adapters else model.twin(), offload

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference, on the device of `model`, with no gradient."""
        with torch.no_grad():
            if not self.adapters:
                yield self.twin.to(model.device)
                if self.offload:
                    self.twin.to("cpu")
                return
            for layer in self.adapters:
                layer._disable_adapters = True
            try:
                yield model
            finally:
                for layer in self.adapters:
                    layer._disable_adapters = False
