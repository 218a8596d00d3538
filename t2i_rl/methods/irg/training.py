"""IRG's training on given trajectories (IRGL, arXiv 2509.06945 section 3.2)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_weights
from t2i_rl.core.fsdp import sharded_like
from t2i_rl.core.hashing import gathered, weights_sha256
from t2i_rl.core.numbers import Count, Decay, GradientNorm, Seed, Weight, check_arguments
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.irg.drawing import DrawsInTurns
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.ranks import in_step, rank_count, sum_over_ranks
from t2i_rl.methods.step import NonFinite, check_optimizer
from t2i_rl.methods.trainable import check_dtype, check_lora, check_trainable, recompute_layers, select_trainable
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.autoregressive.segments import Segment


class IRG(DrawsInTurns):
    """Cross-entropy of what a mode teaches, texts through the language head and pictures through the generation head,
    each a mean over all its tokens of all ranks (docs/irg.md); the weights that are evaluated are an exponential mean.

    Args:
        model: an adapter of family `autoregressive`.
        interleave: how trajectories are drawn, while training and by the tasks.
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`.
        text_loss_weight, image_loss_weight: released: 1 and 1.
        drop_prompt: share of pictures learnt after the model's own unconditional, the negative of `guidance_scale` and
            `prompt_scale`.
        drop_reflection, drop_image: share of second pictures learnt without the reflection, and without the picture
            before: IRG's two negatives.
        ema: decay of the exponential mean; 0 keeps none.
        tokens_per_pass: places with a live graph at a time; changes memory, not the gradient.
        start_from: a checkpoint of this method whose averaged weights to start from (stage 2), with a fresh optimizer.
        trainable: regular expressions on parameter names; the default leaves the VQ model alone frozen, as IRG does.
        lora: arguments of peft's LoraConfig, or None to train the weights themselves.
        judge: a reward that reads pictures, for `interleave.choose` and `stop_above`; evaluation reports its choice
            beside the turns.
        max_grad_norm, on_nonfinite: see `Learner`.
        seed: together with step and place it decides what is dropped.

    Raises:
        UserError: an option outside its range.
    """

    trains = frozenset({"autoregressive"})
    learns_from = "trajectories"
    stages = ("base_direct", "base_plan", "trained_turns")
    steps = 1200  # where a run names none
    keeps_as = "irg"
    weights_come_from = "the model (and method.start_from)"

    def __init__(
        self,
        model: Janus,
        interleave: Rounds,
        optimizer: partial,
        scheduler: partial | None = None,
        text_loss_weight: Weight = 1.0,
        image_loss_weight: Weight = 1.0,
        drop_prompt: Decay = 0.1,
        drop_reflection: Decay = 0.1,
        drop_image: Decay = 0.1,
        ema: Decay = 0.995,
        tokens_per_pass: Count = 8192,
        max_grad_norm: GradientNorm | None = 1.0,
        gradient_checkpointing: bool = False,
        start_from: str | None = None,
        trainable: tuple[str, ...] = (r"model\.(language_model|vision_model|aligner|generation_)", r"lm_head\."),
        lora: dict | None = None,
        judge: Reward | None = None,
        on_nonfinite: str = "raise",
        seed: Seed = 0,
    ):
        super().__init__(optimizer, scheduler, max_grad_norm, on_nonfinite)
        self.judge = judge
        self.interleaved, self.interleave, self.tokens_per_pass = model.interleaved(), interleave, tokens_per_pass
        self.loss_weights = {"text": text_loss_weight, "image": image_loss_weight}
        self.drop_prompt, self.drop_reflection, self.drop_image = drop_prompt, drop_reflection, drop_image
        self.ema, self.start_from, self.seed = ema, start_from, seed
        self.average: dict[str, torch.Tensor] = {}
        self.start_sha256 = weights_sha256(model)
        select_trainable(model.model, trainable, lora)
        if gradient_checkpointing:
            recompute_layers(model)

    @staticmethod
    def check(options: Mapping) -> None:
        """Refuse options, by name as in `__init__`, that cannot train; the command line asks before any weight loads.

        Raises:
            UserError: one line that names the option and its choices.
        """
        check_arguments(IRG, options, "method")
        if not options["text_loss_weight"] and not options["image_loss_weight"]:
            raise UserError("nothing would be trained: give method.text_loss_weight or method.image_loss_weight")
        interleave = options["interleave"]
        if options["judge"] is None and (interleave.choose or interleave.stop_above is not None):
            raise UserError("method.interleave.choose and stop_above need a judge: +reward@method.judge=soft_oracle")
        if options["start_from"]:
            saved_by_irg(Path(options["start_from"]))
        NonFinite.check(options.get("on_nonfinite", "raise"))
        check_trainable(options["trainable"])
        check_lora(options["lora"])
        check_optimizer(options["optimizer"], options["scheduler"])

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """See `Method.check_run`."""
        super().check_run(cfg, training)
        if training:
            check_dtype(cfg)

    def setup(self, stage: str) -> None:
        """Weights of an earlier stage come in after the data was made with the model as it was."""
        if stage == "fit" and self.start_from and not self.batches_done:
            self._start_from(Path(self.start_from))

    def on_train_start(self) -> None:
        """The mean starts from the weights, or goes on where a checkpoint left it."""
        for name, parameter in self.learning() if self.ema else ():
            if name in self.average:
                self.average[name] = sharded_like(self.average[name], parameter).to(parameter)
            else:
                self.average[name] = parameter.detach().clone()

    def training_step(self, batch: list[tuple[int, str, tuple[Segment, ...]]], index: int) -> None:
        """One optimizer step on trajectories, each with its place in the batch of all ranks and its mode."""
        conversations, blank = zip(*(self.dropped(place, segments) for place, _, segments in batch), strict=True)
        totals = self.totals(conversations, blank)
        passes, losses = in_step(self.packed(conversations), self.device), dict.fromkeys(self.loss_weights, 0.0)
        for part in passes:
            sums, zero = self.losses(conversations, blank, part.content)
            # A mean over the tokens of all ranks, while DDP and FSDP average the gradients of ranks: so the share of
            # this rank counts as many times as there are ranks. A pass that is repeated for the others counts 0 times.
            shares = [weight * sums[kind] / max(totals[kind], 1) for kind, weight in self.loss_weights.items()]
            self.add_gradient(part.counts * sum(shares) * rank_count() + zero, part.last)
            for kind in losses:
                losses[kind] += part.counts * float(sums[kind].detach())
        norm = self.step()
        self.batches_done += 1
        self._log(losses, totals, {"train/grad_norm": float(norm), "train/passes": float(len(passes))}, len(batch))

    def totals(self, conversations: Sequence[Sequence[Segment]], blank: Sequence[bool]) -> dict[str, float]:
        """How many tokens of each kind all ranks learn in this step."""
        counts = [self.interleaved.counts(*row) for row in zip(conversations, blank, strict=True)]
        return sum_over_ranks({kind: sum(count[kind] for count in counts) for kind in self.loss_weights}, self.device)

    def losses(
        self, conversations: Sequence[Sequence[Segment]], blank: Sequence[bool], rows: list[list[int]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Cross-entropies in nats of one pass, summed over its tokens of each kind; and a zero with a gradient for
        parameters that this pass may not use (a head without a token to learn), since other ranks wait for theirs."""
        scored, zero = self.interleaved(
            [[conversations[number] for number in row] for row in rows],
            [[blank[number] for number in row] for row in rows],
        )
        return {kind: -logprobs.sum() for kind, (logprobs, _) in scored.items()}, zero

    def _log(self, losses: dict[str, float], totals: dict[str, float], metrics: dict[str, float], rows: int) -> None:
        losses = sum_over_ranks(losses, self.device)
        means = {kind: value / max(totals[kind], 1) for kind, value in losses.items()}
        metrics |= {f"{kind}/loss": value for kind, value in means.items()}
        metrics |= {f"{kind}/tokens": value for kind, value in totals.items()}
        metrics["train/loss"] = sum(weight * means[kind] for kind, weight in self.loss_weights.items())
        self.log_dict(metrics | self.step_metrics(), batch_size=rows)
        self.log("loss", sum(means.values()), prog_bar=True, logger=False, batch_size=rows)

    def dropped(self, place: int, segments: tuple[Segment, ...]) -> tuple[tuple[Segment, ...], bool]:
        """A trajectory without what this step drops of it, and whether its picture is learnt after the model's own
        unconditional.

        What is dropped takes with it what would be learnt without it: the reflection its own loss, and the first
        picture that of the reflection on it.
        """
        rng = np.random.default_rng(derive_seed(self.seed, "drop", self.batches_done, place))
        prompt, reflection, image = rng.random(3) < (self.drop_prompt, self.drop_reflection, self.drop_image)
        learnt = {segment.role for segment in segments if segment.loss}
        blank = bool(prompt) and bool({"draw", "redraw"} & learnt)
        if blank or "redraw" not in learnt:
            return segments, blank
        gone = {role for role, drop in (("reflect", reflection), ("draw", image)) if drop}
        left = [segment for segment in segments if segment.role not in gone]
        if image:
            left = [replace(segment, loss=False) if segment.role == "reflect" else segment for segment in left]
        return tuple(left), False

    @torch.no_grad()
    def after_step(self) -> None:
        """The mean follows the weights."""
        for name, parameter in self.learning() if self.ema else ():
            self.average[name].mul_(self.ema).add_(parameter, alpha=1 - self.ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of those that train."""
        training = {name: parameter.detach().clone() for name, parameter in self.learning()} if self.average else {}
        self.use_average()
        try:
            yield
        finally:
            self._put(training)

    def use_average(self) -> None:
        """From here on the averaged weights are the model's."""
        self._put(self.average)

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.learning():
            if name in values:
                parameter.copy_(sharded_like(values[name], parameter))

    def on_fit_end(self) -> None:
        """A run ends with the averaged weights; its last checkpoint, saved before, holds both."""
        self.use_average()

    def own_state(self) -> dict:
        """Every rank gathers the mean, tensor by tensor; the one that writes keeps it."""
        average = {}
        for name, value in self.average.items():
            whole = gathered(value)
            if self.trainer.is_global_zero:
                average[name] = whole.cpu().clone()
        return {**super().own_state(), "average": average}

    def take_own_state(self, saved: dict) -> None:
        super().take_own_state(saved)
        self.average = saved["average"]

    def draw_as_trained(self) -> None:
        self.use_average()

    def _start_from(self, path: Path) -> None:
        """Averaged weights of an earlier stage.

        Raises:
            UserError: the file is no checkpoint of this method, or of one that trains other parameters.
        """
        values = saved_average(path, self.start_sha256)
        if set(values) != {name for name, _ in self.learning()}:
            raise UserError(
                f"method.start_from={path} holds other weights than this run trains: give its method.trainable and "
                "method.lora"
            )
        self._put(values)


def saved_by_irg(path: Path) -> dict:
    """A checkpoint of this method; its tensors stay on the disk until they are copied: every rank reads one, and it is
    thrice the weights.

    Raises:
        UserError: the file is none.
    """
    checkpoint = read_checkpoint(path, "method.start_from")
    if not isinstance(checkpoint.get(IRG.keeps_as), dict):
        raise UserError(f"method.start_from={path} is a checkpoint of another method than method=irg")
    return checkpoint


def saved_average(path: Path, start_sha256: str) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint, by name; the weights that trained, where it keeps no mean.

    Raises:
        UserError: the file is no checkpoint of this method, or its run started from other weights than those of this
            hash.
    """
    checkpoint = saved_by_irg(path)
    if checkpoint["irg"]["start_sha256"] != start_sha256:
        raise UserError(f"method.start_from={path} was trained from other weights than model.path holds")
    weights = checkpoint["irg"].get("average") or checkpoint["state_dict"]
    check_weights(weights.items(), f"method.start_from={path}")
    return weights
