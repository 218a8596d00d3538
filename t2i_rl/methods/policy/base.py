"""GRPO with three holes: how a rollout is drawn, how its actions are scored, and what is logged of it.

A policy is whatever draws a picture in steps that have probabilities: the tokens of a plan and an image, the turns of a
conversation, the steps of a sampler. Each is a class here that fills in `roll_out`, `logprobs` and, where it has more
to tell, `metrics`.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist

from t2i_rl.core.contract_checks import checked
from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.base import Learner
from t2i_rl.methods.policy.actions import Actions, PassRecord, Rollout, Step, Update
from t2i_rl.methods.policy.loss import group_advantages, importance_ratio, k3, policy_loss, token_weights
from t2i_rl.methods.policy.metrics import reward_metrics, spread_metrics, update_metrics
from t2i_rl.methods.policy.reference import Model, Reference
from t2i_rl.methods.ranks import in_step

Scored = TypeVar("Scored", bound=Actions)


class PolicyMethod(Learner, Generic[Model, Rollout, Scored]):
    """Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300, section 4.1) of any policy.

    One training step: `group_size` rows for each prompt are drawn; one pass without gradient gives their old log-probs,
    one those of the reference; rewards become advantages within a prompt's group; `updates_per_rollout` optimizer steps
    follow the clipped surrogate and the KL. A row's randomness is a function of (seed, rollout, prompt index, sample).

    A subclass decides what learns in `model` before it calls this `__init__`, which takes the frozen copy, and keeps
    the model as `self.model` (or under another name, and gives `model` as a property). It may name its model, what it
    draws and its actions, for type checkers: `PolicyMethod[Janus, TokenRollout, TokenActions]`.

    Args:
        model: what draws and scores.
        reward: what is trained on.
        watch: rewards that are only logged (held-out judges), by name.
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`.
        group_size: rows of each prompt.
        updates_per_rollout: optimizer steps on each rollout.
        clip_range: PPO's clip on the importance ratio; it binds only when `updates_per_rollout > 1`.
        kl_coef: weight of the k3 KL to the frozen initial model; 0 keeps no reference.
        loss_reduction: `token`, `sequence` or `prompt`, see `loss.token_weights`.
        loss_weights: how much an action of each kind counts, by the names in `Actions.kinds`.
        micro_batch_size: rows with a live graph at a time; changes memory, not the gradient.
        offload_reference: keep a frozen copy in the CPU's memory while it is not scoring.
        max_grad_norm, on_nonfinite: see `Learner`.
        seed: together with step, prompt and sample it decides every random draw.
    """

    learns_from = "prompts"

    if TYPE_CHECKING:  # a subclass has it as an attribute or as a property

        @property
        def model(self) -> Model: ...

    def __init__(
        self,
        model: Model,
        reward: Reward | None,
        optimizer: partial,
        watch: dict[str, Reward] | None = None,
        scheduler: partial | None = None,
        *,
        loss_weights: dict[str, float],
        group_size: int = 8,
        updates_per_rollout: int = 1,
        clip_range: float = 0.2,
        kl_coef: float = 0.01,
        loss_reduction: str = "token",
        micro_batch_size: int = 32,
        offload_reference: bool = False,
        max_grad_norm: float | None = 1.0,
        on_nonfinite: str = "raise",
        seed: int = 0,
    ):
        super().__init__(optimizer, scheduler, max_grad_norm, on_nonfinite)
        self.reward = cast(Reward, reward)  # None only where nothing is trained, and nothing is rewarded
        self.watch = watch or {}
        self.group_size, self.updates_per_rollout, self.micro_batch_size = (
            group_size,
            updates_per_rollout,
            micro_batch_size,
        )
        self.clip_range, self.kl_coef = clip_range, kl_coef
        self.loss_reduction, self.loss_weights, self.seed = loss_reduction, loss_weights, seed
        self.reference: Reference[Model] | None = Reference(model, offload_reference) if kl_coef else None
        self.start_sha256 = self.reference.sha256 if self.reference else weights_sha256(model, adapters=False)

    def roll_out(self, batch: list[tuple[int, Prompt]]) -> Rollout:
        """Draw the rows of a batch, as rewards read them; see `rows`. Called without gradient."""
        raise NotImplementedError(f"{type(self).__name__} must have roll_out(batch)")

    def logprobs(self, rollout: Rollout, part: Any, model: Model) -> Scored:
        """Score the actions of one of the `passes` of a rollout under `model`: the policy, or the frozen reference.

        Without gradient where grad mode is off. The same pass gives the same actions, whatever the model.
        """
        raise NotImplementedError(f"{type(self).__name__} must have logprobs(rollout, part, model)")

    def metrics(self, step: Step[Rollout]) -> dict[str, float]:
        """What a step logs beside rewards, rate and seconds. Under DDP each number is averaged over ranks."""
        spread = spread_metrics(step.reward, step.advantages, self.group_size)
        return spread | update_metrics(step.updates, self.clip_range)

    @property
    def rollouts_done(self) -> int:
        """Where the stream of prompts goes on: a batch of prompts is a rollout."""
        return self.batches_done

    def training_step(self, batch: list[tuple[int, Prompt]], index: int) -> None:
        """One rollout of the prompts in `batch` (each with its index in the prompt list) and its updates."""
        clock = Clock()
        with torch.no_grad():
            rollout = self.roll_out(batch)
        clock.lap("rollout")
        passes = self.passes(rollout)
        old = self.score(rollout, passes)
        reference = self.score_reference(rollout, passes)
        clock.lap("score")
        reward, watched = self.ask_rewards(rollout)
        advantages = self.advantages(reward.total).to(self.device)
        clock.lap("reward")
        updates = [self.update(rollout, passes, old, reference, advantages) for _ in range(self.updates_per_rollout)]
        clock.lap("update")
        self.batches_done += 1
        self._log(Step(rollout, reward, watched, advantages, updates, clock.seconds))

    def rows(self, batch: list[tuple[int, Prompt]]) -> tuple[list[Prompt], list[int]]:
        """Prompt and seed of each row of a batch's rollout, the rows of a group adjacent."""
        rows = [(number, prompt, sample) for number, prompt in batch for sample in range(self.group_size)]
        seeds = [derive_seed(self.seed, "train", self.rollouts_done, number, sample) for number, _, sample in rows]
        return [prompt for _, prompt, _ in rows], seeds

    def passes(self, rollout: Rollout) -> Sequence[Any]:
        """What is scored and differentiated at a time, as `logprobs` is given it: slices of rows."""
        size = self.micro_batch_size
        return [slice(first, min(first + size, len(rollout))) for first in range(0, len(rollout), size)]

    @torch.no_grad()
    def score(self, rollout: Rollout, passes: Sequence[Any]) -> list[Scored]:
        """The actions of each pass as the policy scores them that drew them: what updates are compared to."""
        return self._scored(rollout, passes, self.model)

    def score_reference(self, rollout: Rollout, passes: Sequence[Any]) -> list[torch.Tensor] | None:
        """The reference's log-probs of the actions of each pass; None without a KL."""
        if self.reference is None:
            return None
        with self.reference.scoring(self.model) as frozen:
            return [actions.logprobs for actions in self._scored(rollout, passes, frozen)]

    def _scored(self, rollout: Rollout, passes: Sequence[Any], model: Model) -> list[Scored]:
        scored = [self.logprobs(rollout, part.content, model) for part in in_step(passes, self.device)]
        return scored[: len(passes)]  # what came after kept other ranks company

    def ask_rewards(self, rollout: Rollout) -> tuple[RewardOutput, dict[str, RewardOutput]]:
        """What is trained on, and what the watched say."""
        read = self.as_read(self.reward, rollout)
        read_by = {name: self.as_read(judge, rollout) for name, judge in self.watch.items()}
        with torch.autocast(self.device.type, enabled=False):  # a reward computes in the dtype that it was given
            reward = self.rewards(read)
            watched = {name: checked(judge(read_by[name]), len(rollout), name) for name, judge in self.watch.items()}
        return reward, watched

    def as_read(self, reward: Reward, rollout: Rollout) -> Rollout:
        """The rollout as one reward reads it."""
        return rollout

    def rewards(self, rollout: Rollout) -> RewardOutput:
        """What is trained on, `(B,)`; its parts are logged."""
        return checked(self.reward(rollout), len(rollout), type(self.reward).__name__)

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Advantages `(B,)` of rewards `(B,)`, the rows of a group adjacent."""
        return group_advantages(rewards, self.group_size)

    def update(
        self,
        rollout: Rollout,
        passes: Sequence[Any],
        old: list[Scored],
        reference: list[torch.Tensor] | None,
        advantages: torch.Tensor,
    ) -> Update:
        """One optimizer step on the whole rollout; passes accumulate, and ranks are weighted by their actions."""
        weights, total = self.weights(old)
        records = []
        for part in in_step(passes, self.device):
            before, weight = old[part.number], weights[part.number]
            now = self.logprobs(rollout, part.content, self.model)
            loss = policy_loss(now.logprobs, before.logprobs, advantages[before.owner], self.clip_range)
            kl = k3(now.logprobs, reference[part.number]) if reference is not None else torch.zeros_like(loss)
            costs = (loss + self.kl_coef * kl) * weight
            costs = torch.where(weight != 0, costs, 0.0)  # what weighs nothing may be infinite
            objective = part.counts * (costs.sum() / total)
            self.add_gradient(objective + now.zero, part.last)
            if part.counts:
                ratio = importance_ratio((now.logprobs - before.logprobs).detach())
                records.append(PassRecord(before, objective.detach(), loss.detach(), kl.detach(), ratio))
        return Update(records, self.step(), total)

    def weights(self, old: list[Scored]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """How much each action counts in the loss, a tensor `(R, T)` a pass, and what their weighted sum is divided by.

        The loss is a mean over the actions of all ranks. DDP and FSDP average the gradients of ranks, where a sum is
        wanted: so the total weight of all ranks is divided by their number.
        """
        by_kind = []
        for actions in old:
            weight = actions.mask.float()
            for kind, where in actions.kinds.items():
                weight[where] *= self.loss_weights[kind]
            by_kind.append(weight)
        weights = token_weights(torch.cat(by_kind), self.loss_reduction, self.group_size)
        total = weights.sum()
        if dist.is_initialized():
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        total = torch.where(total == 0, 1.0, total)  # a rollout without an action that counts moves nothing
        return weights.split([len(weight) for weight in by_kind]), total

    def _log(self, step: Step[Rollout]) -> None:
        metrics = {
            **reward_metrics(step),
            **self.metrics(step),
            **self.step_metrics(),
            **{f"time/{name}": seconds for name, seconds in step.seconds.items()},
        }
        self.log_dict(metrics, sync_dist=dist.is_initialized(), batch_size=len(step.rollout))
        self.log("reward", metrics["reward/total"], prog_bar=True, logger=False)

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Prompts are text: there is nothing to move."""
        return batch


class Clock:
    """Seconds of the parts of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Say that a part of this name ends here."""
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now
