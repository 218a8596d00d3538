"""IRG's training: think, draw, look, reflect, draw better, learnt from given trajectories (IRGL, arXiv 2509.06945 section 3.2)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_weights
from t2i_rl.core.fsdp import mesh_of, shard, sharded_like
from t2i_rl.core.hashing import gathered, weights_sha256
from t2i_rl.core.numbers import Count, Decay, GradientNorm, Seed, Weight, check_arguments
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.base import Learner
from t2i_rl.methods.irg.evaluation import TurnsEvaluator
from t2i_rl.methods.irg.rounds import Interleave
from t2i_rl.methods.trainable import (
    NonFinite,
    check_lora,
    check_optimizer,
    check_trainable,
    refuse_rounded_updates,
    select_trainable,
)
from t2i_rl.models.autoregressive.segments import Segment


class IRG(Learner):
    """Cross-entropy of what a mode teaches, texts through the language head and pictures through the generation head, each a mean over all its tokens of all
    ranks (specification section 2.2); the weights that are evaluated are an exponential mean.

    Args:
        model: an adapter of family `autoregressive`.
        interleave: how trajectories are drawn, while training and by the tasks.
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`.
        text_loss_weight, image_loss_weight: released: 1 and 1.
        drop_prompt: share of pictures learnt after the model's own unconditional, the negative of `guidance_scale` and `prompt_scale`.
        drop_reflection, drop_image: share of second pictures learnt without the reflection, and without the picture before: IRG's two negatives.
        ema: decay of the exponential mean; 0 keeps none.
        tokens_per_pass: places with a live graph at a time; changes memory, not the gradient.
        start_from: a checkpoint of this method whose averaged weights to start from (stage 2), with a fresh optimizer.
        trainable: regular expressions on parameter names; the default leaves the VQ model alone frozen, as IRG does.
        lora: arguments of peft's LoraConfig, or None to train the weights themselves.
        judge: a reward that reads pictures, for `interleave.choose` and `stop_above`; evaluation reports its choice beside the turns.
        on_nonfinite: `raise` or `skip` where a step's gradient is not finite, see `trainable.NonFinite`.
        seed: together with step and place it decides what is dropped.

    Raises:
        UserError: an option outside its range.
    """

    trains = frozenset({"autoregressive"})
    learns_from = "trajectories"
    draws_in_turns = True
    stages = ("base_direct", "base_plan", "trained_turns")
    steps = 1200  # where a run names none
    keeps_as = "irg"

    def __init__(
        self,
        model: torch.nn.Module,
        interleave: Interleave,
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
        judge: object | None = None,
        on_nonfinite: str = "raise",
        seed: Seed = 0,
    ):
        super().__init__()
        self.judge = judge
        self.interleaved, self.interleave = model.interleaved(), interleave
        self.optimizer_partial, self.scheduler_partial, self.seed = optimizer, scheduler, seed
        self.loss_weights = {"text": text_loss_weight, "image": image_loss_weight}
        self.drop_prompt, self.drop_reflection, self.drop_image = drop_prompt, drop_reflection, drop_image
        self.ema, self.tokens_per_pass, self.max_grad_norm = ema, tokens_per_pass, max_grad_norm
        self.start_sha256 = weights_sha256(model)
        select_trainable(model.model, trainable, lora)
        if gradient_checkpointing:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for block in model.blocks():
                block.training = True
        self.average: dict[str, torch.Tensor] = {}
        self.nonfinite = NonFinite(on_nonfinite)
        self.batches_done = 0
        self.start_from = start_from

    @property
    def model(self):
        return self.interleaved.adapter

    def turns(self, benchmark, folder: Path, seed: int, batch_size: int) -> TurnsEvaluator:
        """What evaluates every turn of this method's drawing."""
        return TurnsEvaluator(self.interleaved, self.interleave, self.judge, benchmark, folder, seed, batch_size)

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

    def setup(self, stage: str) -> None:
        """Weights of an earlier stage come in after the data was made with the model as it was."""
        if stage == "fit" and self.start_from and not self.batches_done:
            self._start_from(Path(self.start_from))

    def configure_model(self) -> None:
        """Shard where the strategy is FSDP."""
        mesh = mesh_of(self.trainer)
        if mesh is not None:
            shard(self.interleaved, mesh)

    def on_fit_start(self) -> None:
        refuse_rounded_updates(self.model)

    def on_train_start(self) -> None:
        """The mean starts from the weights, or goes on where a checkpoint left it."""
        if self.ema:
            self.average = {
                name: sharded_like(self.average[name], parameter).to(parameter) if name in self.average else parameter.detach().clone()
                for name, parameter in self.learning()
            }  # fmt: skip

    def training_step(self, batch: list[tuple[int, str, tuple[Segment, ...]]], index: int) -> None:
        """One optimizer step on trajectories, each with its place in the batch of all ranks and its mode."""
        conversations, blank = zip(*(self.dropped(number, segments) for number, _, segments in batch), strict=True)
        counted = [self.interleaved.counts(each, empty) for each, empty in zip(conversations, blank, strict=True)]
        totals = self._over_ranks({kind: sum(each[kind] for each in counted) for kind in self.loss_weights})
        passes = self.passes(conversations)
        wanted = self._most(len(passes))  # with fewer, a rank computes its last once more for nothing: collectives meet
        sums = dict.fromkeys(self.loss_weights, 0.0)
        for number in range(wanted):
            rows = passes[min(number, len(passes) - 1)]
            found, nothing = self.interleaved([[conversations[i] for i in row] for row in rows], [[blank[i] for i in row] for row in rows])  # fmt: skip
            once = float(number < len(passes))
            lost = {kind: -logprobs.sum() for kind, (logprobs, _) in found.items()}
            loss = sum(once * weight * lost[kind] / max(totals[kind], 1) for kind, weight in self.loss_weights.items())
            with self._meeting(number == wanted - 1):
                self.manual_backward(loss * self._ranks() + nothing)
            for kind in sums:
                sums[kind] += once * float(lost[kind].detach())
        norm = self._step()
        means = {kind: value / max(totals[kind], 1) for kind, value in self._over_ranks(sums).items()}
        self.log_dict(
            {
                **{f"{kind}/loss": value for kind, value in means.items()},
                **{f"{kind}/tokens": float(value) for kind, value in totals.items()},
                "train/loss": sum(weight * means[kind] for kind, weight in self.loss_weights.items()),
                "train/grad_norm": float(norm),
                "train/lr": self.optimizers().param_groups[0]["lr"],
                "train/passes": float(wanted),
                **self.nonfinite.metrics(),
            },
            batch_size=len(batch),
        )
        self.log("loss", sum(means.values()), prog_bar=True, logger=False, batch_size=len(batch))

    def passes(self, conversations: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Passes of rows of conversations, by number; every rank calls it.

        Raises:
            UserError: on every rank, where one has a conversation longer than the model's positions.
        """
        lengths = self.interleaved.lengths(conversations)
        longest = self._most(max(lengths))
        if longest > self.interleaved.positions:
            asked = next(each.text for each in conversations[int(np.argmax(lengths))] if each.role == "prompt")
            raise UserError(f"a trajectory of {longest} tokens (of this process the longest is that of {asked[:60]!r}), and the model has {self.interleaved.positions - 1} positions: make the data with shorter texts (task.words); drawn ones: method.interleave.max_tokens, or policy=window")  # fmt: skip
        return self.interleaved.passes(conversations, self.tokens_per_pass)

    def dropped(self, number: int, segments: tuple[Segment, ...]) -> tuple[tuple[Segment, ...], bool]:
        """A trajectory without what this step drops of it, and whether its picture is learnt after the model's own unconditional.

        What is dropped takes with it what would be learnt without it: the reflection its own loss, and the first picture that of the reflection on it.
        """
        rng = np.random.default_rng(derive_seed(self.seed, "drop", self.batches_done, number))
        prompt, reflection, image = rng.random(3) < (self.drop_prompt, self.drop_reflection, self.drop_image)
        learnt = {segment.role for segment in segments if segment.loss}
        blank = bool(prompt) and bool({"draw", "redraw"} & learnt)
        if blank or "redraw" not in learnt:
            return segments, blank
        gone = {role for role, drop in (("reflect", reflection), ("draw", image)) if drop}
        left = (segment for segment in segments if segment.role not in gone)
        return tuple(replace(segment, loss=False) if image and segment.role == "reflect" else segment for segment in left), False  # fmt: skip

    def _step(self) -> torch.Tensor:
        learning = [parameter for _, parameter in self.learning()]
        norm = gathered(torch.nn.utils.clip_grad_norm_(learning, self.max_grad_norm or float("inf")))
        optimizer, allowed = self.optimizers(), self.nonfinite.allows(norm, self.global_step)
        if allowed:
            optimizer.step()
            if self.scheduler_partial is not None:
                self.lr_schedulers().step()
        optimizer.zero_grad(set_to_none=True)
        self.batches_done += 1
        with torch.no_grad():
            for name, parameter in self.learning() if self.ema and allowed else ():
                self.average[name].mul_(self.ema).add_(parameter, alpha=1 - self.ema)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of those that train."""
        kept = {name: parameter.detach().clone() for name, parameter in self.learning()} if self.average else {}
        self.use_average()
        try:
            yield
        finally:
            self._put(kept)

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

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Pictures move where they are laid out."""
        return batch

    def _meeting(self, last: bool):
        """Ranks add their gradients up in the last pass of a step."""
        waits = not last and dist.is_initialized()
        return self.trainer.strategy.block_backward_sync() if waits else nullcontext()

    def _ranks(self) -> int:
        """DDP and FSDP average gradients over ranks, and the loss is a mean over the tokens of all."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def _over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        together = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(together)
        return dict(zip(values, together.tolist(), strict=True))

    def _most(self, count: int) -> int:
        most = torch.tensor(count, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def configure_optimizers(self):
        optimizer = self.optimizer_partial([parameter for _, parameter in self.learning()])
        return optimizer if self.scheduler_partial is None else ([optimizer], [self.scheduler_partial(optimizer)])

    def own_state(self) -> dict:
        """Every rank gathers the mean, tensor by tensor; the one that writes keeps it."""
        average = {}
        for name, value in self.average.items():
            whole = gathered(value)
            if self.trainer.is_global_zero:
                average[name] = whole.cpu().clone()
        return {
            "batches_done": self.batches_done,
            "start_sha256": self.start_sha256,
            "average": average,
            "skipped": self.nonfinite.skipped,
        }

    def take_own_state(self, saved: dict) -> None:
        if saved["start_sha256"] != self.start_sha256:
            raise UserError(
                "this checkpoint was trained from other weights than model.path holds: give the model (and method.start_from) that its run started from"
            )
        self.batches_done, self.average = saved["batches_done"], saved["average"]
        self.nonfinite.skipped = saved.get("skipped", 0)

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
                f"method.start_from={path} holds other weights than this run trains: give its method.trainable and method.lora"
            )
        self._put(values)


def saved_by_irg(path: Path) -> dict:
    """A checkpoint of this method; its tensors stay on the disk until they are copied: every rank reads one, and it is thrice the weights.

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
        UserError: the file is no checkpoint of this method, or its run started from other weights than those of this hash.
    """
    checkpoint = saved_by_irg(path)
    if checkpoint["irg"]["start_sha256"] != start_sha256:
        raise UserError(f"method.start_from={path} was trained from other weights than model.path holds")
    weights = checkpoint["irg"]["average"] or checkpoint["state_dict"]
    check_weights(weights.items(), f"method.start_from={path}")
    return weights
