"""What every method is, and what every method that learns does alike: one optimizer step, its part of a checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from hydra.utils import get_class
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import DictConfig
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from t2i_rl import __version__
from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.choices import choices
from t2i_rl.core.contracts import Drawn
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import RAN_AWAY, check_checkpoint
from t2i_rl.core.hashing import gathered
from t2i_rl.core.stated import STATED, Stated
from t2i_rl.core.used_settings import plain
from t2i_rl.data.base import Data
from t2i_rl.evaluation.drawer import Drawer
from t2i_rl.methods.fitting import adapters_of, check_learns
from t2i_rl.methods.identity import ABOUT, FORMAT, own_part
from t2i_rl.methods.step import NonFinite
from t2i_rl.rewards.none import NoReward


class Method(Stated, L.LightningModule):
    """A method, as the command line and the tasks see its class.

    trains: families of models that it takes.
    learns_from: what its data module `gives`.
    draws: what its rollouts give a reward to read, see `contracts.Reward.reads`.
    draws_in_turns: whether it thinks, draws, reflects and draws again.
    searches_noise: whether it looks for better noise, prompt by prompt, and trains no weight.
    needs_gradients: whether a reward must be differentiable.
    drawer: how its stages are drawn and compared, and what their tables show.
    mode, stages, steps: how its pictures are drawn, which stages are measured and for how many steps it trains, where
        nothing else is said; None: as is usual for the model's family.
    """

    stated = STATED["method"]
    fixed = ("trains",)
    trains: frozenset[str] = frozenset()
    learns_from: str = "prompts"
    draws: type[Drawn] = Drawn
    draws_in_turns: bool = False
    searches_noise: bool = False
    needs_gradients: bool = False
    drawer: type[Drawer] = Drawer
    mode: str | None = None
    stages: tuple[str, ...] | None = None
    steps: int | None = None

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Refuse options, by name as in `__init__`, that cannot work; the command line asks before any weight loads.

        Raises:
            UserError: one line that names the option and its choices.
        """

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """Refuse the rest of a run's config where this method cannot work with it, before anything is made.

        Args:
            cfg: the whole config.
            training: whether the run trains, or only draws with what was trained.

        Raises:
            UserError: one line that names the setting and what to take.
        """
        data: type[Data] = get_class(cfg.data._target_)
        rewarded = not issubclass(get_class(cfg.reward._target_), NoReward)
        if data.gives != cls.learns_from:
            raise UserError(
                f"{cls.__name__} learns from {cls.learns_from}, and {data.__name__} gives {data.gives}: "
                f"take {cls.data_to_take()}"
            )
        if cls.learns_from == "prompts" and not rewarded:
            names = ", ".join(name for name in choices("reward") if name != "none")
            raise UserError(f"{cls.__name__} learns from a reward: take one of reward={names}")
        if cls.learns_from != "prompts" and rewarded:
            raise UserError(f"{cls.__name__} learns from {cls.learns_from}, without a reward: take reward=none")
        if not cls.searches_noise and (cfg.regularizer.terms or cfg.regularizer.constraint):
            raise UserError(
                f"regularizer= holds noise Gaussian, and {cls.__name__} optimises none: take method=noise_opt, or "
                "leave it out"
            )

    @classmethod
    def data_to_take(cls) -> str:
        """Configs of data that give what it learns from."""
        return {
            "pairs": "data=shapes_pairs",
            "preferences": "data=preferences",
            "trajectories": "data=irgl_shapes, or data=irgl with data.path=<folder>",
            "prompts": "data=shapes",
        }[cls.learns_from]


class Learner(Method):
    """A method that learns: which parameters do, one optimizer step, and what of it a checkpoint keeps.

    A subclass puts its model under a name of its own (names of weights in checkpoints begin with it), sets
    `start_sha256`, and writes `training_step`, which ends with `batches_done += 1`.

    keeps_as: the key of its own state in a checkpoint.
    counter_key, hash_key: the names of `batches_done` and `start_sha256` in that state.
    weights_come_from: what decides the weights that training starts from, as a refusal names it.
    decide_what_learns: the settings that decide which weights a checkpoint holds.

    Args:
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`.
        max_grad_norm: to which a step's gradient is clipped; None leaves it as it is.
        on_nonfinite: see `step.NonFinite`.
        schedule_every: batches from one step of the scheduler to the next.
    """

    keeps_as: str = ""
    counter_key: str = "batches_done"
    hash_key: str = "start_sha256"
    weights_come_from: str = "the model"
    decide_what_learns: tuple[str, ...] = ("trainable", "lora")

    def __init__(
        self,
        optimizer: partial,
        scheduler: partial | None = None,
        max_grad_norm: float | None = 1.0,
        on_nonfinite: str = "raise",
        schedule_every: int = 1,
    ):
        super().__init__()
        self.automatic_optimization = False
        # A checkpoint lacks what is frozen, which Lightning would refuse; `on_load_checkpoint` is stricter in its
        # place.
        self.strict_loading = False
        self.optimizer_partial, self.scheduler_partial = optimizer, scheduler
        self.max_grad_norm, self.nonfinite, self.schedule_every = max_grad_norm, NonFinite(on_nonfinite), schedule_every
        self.batches_done = 0  # batches that were learnt from, also where the step was left out: data go on from here
        self.start_sha256 = ""
        self.recipe: dict[str, Any] = {}  # see `recipes.recipe_of`; a method that no config made has none

    def learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What trains, by name."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer_partial([parameter for _, parameter in self.learning()])
        return optimizer if self.scheduler_partial is None else ([optimizer], [self.scheduler_partial(optimizer)])

    def add_gradient(self, loss: torch.Tensor, last: bool) -> None:
        """Add one pass's gradient to those of the passes before it. Ranks add theirs up in the `last` pass of a step
        alone: earlier, each would send its own for nothing."""
        waits = dist.is_initialized() and not last
        # where there are ranks, the strategy is a parallel one
        strategy = cast(ParallelStrategy, self.trainer.strategy) if waits else None
        with strategy.block_backward_sync() if strategy is not None else nullcontext():
            self.manual_backward(loss)

    def step(self) -> torch.Tensor:
        """One optimizer step on the gradients that the passes added up; returns their norm before the clip.

        Raises:
            UserError: the gradient is not finite, see `step.NonFinite`.
        """
        parameters = [parameter for _, parameter in self.learning()]
        norm = gathered(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf")))
        optimizer, allowed = self._optimizer(), self.nonfinite.allows(norm, self.global_step)
        if allowed:
            optimizer.step()
            if self.scheduler_partial is not None and (self.batches_done + 1) % self.schedule_every == 0:
                cast(LRScheduler, self.lr_schedulers()).step()  # the one of `configure_optimizers`
        optimizer.zero_grad(set_to_none=True)
        if allowed:
            self.after_step()
        return norm

    def _optimizer(self) -> LightningOptimizer:
        """The one of `configure_optimizers`."""
        return cast(LightningOptimizer, self.optimizers())

    def after_step(self) -> None:
        """Nothing, unless a subclass follows its weights with an average."""

    def step_metrics(self) -> dict[str, float]:
        """What is logged of every optimizer: its rate, and steps left out."""
        return {"train/lr": self._optimizer().param_groups[0]["lr"], **self.nonfinite.metrics()}

    def kept_names(self) -> set[str]:
        """Names of what a checkpoint holds: everything else is the initial model, which it names by its hash."""
        return {name for name, _ in self.learning()}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch has overloads
        """See `kept_names`."""
        names = self.kept_names()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in names}

    def own_state(self) -> dict:
        """What this method keeps beside its weights; every rank calls it."""
        return {
            self.counter_key: self.batches_done,
            self.hash_key: self.start_sha256,
            "skipped": self.nonfinite.skipped,
        }

    def take_own_state(self, saved: dict) -> None:
        """Go on from what `own_state` returned.

        Raises:
            UserError: it was trained from other weights.
        """
        if saved[self.hash_key] not in (None, self.start_sha256):  # None: written before every run had its hash
            raise UserError(
                "this checkpoint was trained from other weights than model.path holds: give "
                f"{self.weights_come_from} that its run started from"
            )
        self.batches_done = saved[self.counter_key]
        self.nonfinite.skipped = saved.get("skipped", 0)

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
