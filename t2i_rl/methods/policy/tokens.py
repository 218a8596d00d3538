"""GRPO for autoregressive image models: roll out plans and images, score, reward, update. IRIS is this with `reward=nsc`."""

import time
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist

from t2i_rl.core.contract_checks import checked
from t2i_rl.core.contracts import RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.fsdp import mesh_of, shard
from t2i_rl.core.hashing import gathered, weights_sha256
from t2i_rl.core.numbers import ClipRange, Count, GradientNorm, GroupSize, Seed, Weight, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.base import Learner
from t2i_rl.methods.policy.loss import REDUCTIONS, group_advantages, k3, policy_loss, token_weights
from t2i_rl.methods.policy.metrics import rollout_metrics, update_metrics
from t2i_rl.methods.trainable import (
    NonFinite,
    Reference,
    check_lora,
    check_optimizer,
    check_trainable,
    refuse_rounded_updates,
    select_trainable,
)
from t2i_rl.models.autoregressive.engine.score import DISTRIBUTIONS
from t2i_rl.models.autoregressive.engine.stats import TokenStats
from t2i_rl.models.autoregressive.rollout import TokenRollout


class GRPO(Learner):
    """Group-relative policy optimisation over plan tokens and image tokens (T2I-R1 section 3.3, IRIS section 3).

    One training step: `group_size` plans for each prompt and one image for each plan, sampled under guidance; one teacher-forced pass
    without gradient for the old log-probs, one for the reference; the reward; `updates_per_rollout` optimizer steps.

    Args:
        model: an adapter of family `autoregressive`.
        reward: what is trained on; a class with `needs_images`, `distribution` and `__call__(rollout) -> RewardOutput`.
        watch: rewards that are only logged (held-out judges), by name.
        logprob: whose log-prob an image token gets: `conditional` (T2I-R1), `guided` (the sampler's own: the unbiased one),
            `guided_detach_uncond`. See docs/logprob.md.
        clip_range: PPO's clip on the importance ratio; it binds only when `updates_per_rollout > 1`.
        kl_coef: weight of the k3 KL to the frozen initial model; 0 keeps no reference.
        loss_reduction: `token`, `sequence` or `prompt`, see `grpo_loss.token_weights`.
        text_loss_weight, image_loss_weight: weight of a plan token and of an image token; 0 trains one of the two alone (T2I-R1 section 4.3).
        micro_batch_size: rows with a live graph at a time; changes memory, not the gradient.
        gradient_checkpointing: keep only the inputs of layers for the backward pass and compute the rest again.
        offload_reference: keep the frozen copy in the CPU's memory while it is not scoring; without effect under LoRA, which has no copy.
        trainable: regular expressions on parameter names; the default trains trunk, embeddings and language head, not the image head.
        lora: arguments of peft's LoraConfig, or None to train the weights themselves.
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`.
        on_nonfinite: `raise` or `skip` where a step's gradient is not finite, see `trainable.NonFinite`.
        seed: together with step, prompt and sample it decides every random draw.

    Raises:
        UserError: an option outside its choices.
    """

    trains = frozenset({"autoregressive"})
    draws = TokenRollout
    keeps_as = "grpo"
    decide_what_learns = ("trainable", "lora", "plan", "text_loss_weight")

    def __init__(
        self,
        model: torch.nn.Module,
        reward,
        optimizer: partial,
        watch: dict | None = None,
        group_size: GroupSize = 8,
        plan: bool = True,
        logprob: str = "conditional",
        updates_per_rollout: Count = 1,
        clip_range: ClipRange = 0.2,
        kl_coef: Weight = 0.01,
        loss_reduction: str = "token",
        text_loss_weight: Weight = 1.0,
        image_loss_weight: Weight = 1.0,
        micro_batch_size: Count = 32,
        max_grad_norm: GradientNorm | None = 1.0,
        gradient_checkpointing: bool = False,
        offload_reference: bool = False,
        trainable: tuple[str, ...] = (r"model\.language_model\.", r"lm_head\."),
        lora: dict | None = None,
        scheduler: partial | None = None,
        on_nonfinite: str = "raise",
        seed: Seed = 0,
    ):
        super().__init__()
        self.check(locals())
        self.model, self.reward, self.watch = model, reward, watch or {}
        self.group_size, self.plan, self.logprob = group_size, plan, logprob
        self.updates_per_rollout, self.clip_range, self.kl_coef = updates_per_rollout, clip_range, kl_coef
        self.text_loss_weight, self.image_loss_weight = text_loss_weight, image_loss_weight
        self.loss_reduction, self.micro_batch_size, self.max_grad_norm = loss_reduction, micro_batch_size, max_grad_norm
        self.optimizer_partial, self.scheduler_partial, self.seed = optimizer, scheduler, seed
        writes = plan and text_loss_weight != 0
        patterns = [pattern for pattern in trainable if writes or not pattern.startswith("lm_head")]
        select_trainable(model.model, patterns, lora)
        refuse_rounded_updates(model)
        if gradient_checkpointing:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for block in model.blocks():
                block.training = True  # of the block alone: it is what transformers asks before it checkpoints
        self.reference = Reference(model, offload_reference) if kl_coef else None
        self.nonfinite = NonFinite(on_nonfinite)
        self.start_sha256 = self.reference.sha256 if self.reference else weights_sha256(model, adapters=False)
        self.rollouts_done = 0

    @staticmethod
    def check(options: Mapping) -> None:
        """Refuse options, by name as in `__init__`, that cannot train; the command line asks before any weight loads.

        Raises:
            UserError: one line that names the option and its choices.
        """
        check_arguments(GRPO, options, "method")
        for name, choices in (("logprob", DISTRIBUTIONS), ("loss_reduction", REDUCTIONS)):
            if options[name] not in choices:
                raise UserError(f"method.{name} must be one of {', '.join(choices)}, not {options[name]!r}")
        if not (options["plan"] and options["text_loss_weight"]) and not options["image_loss_weight"]:
            raise UserError(
                "nothing would be trained: give method.image_loss_weight, or method.text_loss_weight with method.plan=true"
            )
        NonFinite.check(options.get("on_nonfinite", "raise"))
        check_trainable(options["trainable"])
        check_lora(options["lora"])
        check_optimizer(options["optimizer"], options["scheduler"])

    def configure_model(self) -> None:
        """Shard policy and reference where the strategy is FSDP."""
        mesh = mesh_of(self.trainer)
        if mesh is not None:
            shard(self.model, mesh)
            if self.reference is not None and self.reference.twin is not None:
                shard(self.reference.twin, mesh)

    def training_step(self, batch: list[tuple[int, Prompt]], index: int) -> None:
        """One rollout of the prompts in `batch` (each with its index in the prompt list) and its updates."""
        times = {"start": time.perf_counter()}
        rollout = self.roll_out(batch)
        times["rollout"] = time.perf_counter()
        reference = self.score(rollout)
        times["score"] = time.perf_counter()
        reward, watched = self.judge(rollout)
        advantages = self.advantages(reward.total).to(self.device)
        times["reward"] = time.perf_counter()
        updates = [self.update(rollout, reference, advantages) for _ in range(self.updates_per_rollout)]
        times["update"] = time.perf_counter()
        self.rollouts_done += 1
        metrics = rollout_metrics(rollout, reward, watched, advantages, times) | update_metrics(updates)
        metrics["train/lr"] = self.optimizers().param_groups[0]["lr"]
        metrics |= self.nonfinite.metrics()
        self.log_dict(metrics, sync_dist=dist.is_initialized(), batch_size=len(rollout))
        self.log("reward", metrics["reward/total"], prog_bar=True, logger=False)

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Prompts are text: there is nothing to move."""
        return batch

    @torch.no_grad()
    def roll_out(self, batch: list[tuple[int, Prompt]]) -> TokenRollout:
        """Sample `group_size` rows for each prompt. A row's randomness is a function of (seed, rollout, prompt index, sample)."""
        rows = [(number, prompt, sample) for number, prompt in batch for sample in range(self.group_size)]
        seeds = [derive_seed(self.seed, "train", self.rollouts_done, number, sample) for number, _, sample in rows]
        self.model.prepare()
        texts, plans, extra = [prompt.text for _, prompt, _ in rows], [""] * len(rows), {}
        if self.plan:
            (ids, mask), (tokens, token_mask), plans = self.model.draw_plans(texts, seeds)
            extra = {"plan_ids": ids, "plan_mask": mask, "plan_tokens": tokens, "plan_token_mask": token_mask}
            extra["plan_truncated"] = ~((tokens == self.model.special["eos"]) & token_mask).any(dim=1)
        (ids, mask), drawn = self.model.draw_images(texts, plans, [seed + 1 for seed in seeds])
        self.model.engine.rollout_done()
        wants_images = self.reward.needs_images or any(reward.needs_images for reward in self.watch.values())
        return TokenRollout(
            prompts=[prompt for _, prompt, _ in rows],
            group_size=self.group_size,
            seeds=seeds,
            plans=plans,
            image_ids=ids,
            image_mask=mask,
            image_tokens=drawn.tokens,
            drawn=drawn,
            text_vocabulary=self.model.model.config.text_config.vocab_size,
            image_vocabulary=self.model.model.config.vq_config.num_embeddings,
            images=self.model.decode(drawn.tokens) if wants_images else None,
            **extra,
        )

    @torch.no_grad()
    def score(self, rollout: TokenRollout) -> torch.Tensor | None:
        """Fill in the rollout policy's statistics; returns the reference's log-probs `(B, T + N)`, None without a KL."""
        chunks = [rollout.rows(part) for part in self.micro_batches(len(rollout))]
        scored = [self.stats(self.model, chunk) for chunk in chunks]
        rollout.text_stats = _concatenate([text for text, _ in scored]) if self.plan else None
        rollout.image_stats = _concatenate([image for _, image in scored])
        if self.reference is None:
            return None
        with self.reference.scoring(self.model) as reference:
            return torch.cat([_joined(*self.stats(reference, chunk))[0] for chunk in chunks])

    def stats(
        self, model, rollout: TokenRollout, distribution: str | None = None
    ) -> tuple[TokenStats | None, TokenStats]:
        """Teacher-forced statistics of plan and image tokens under `model`, with gradient where grad mode is on and it is wanted."""
        grad, text = torch.is_grad_enabled(), None
        if self.plan:
            plan = (rollout.plan_ids, rollout.plan_mask, rollout.plan_tokens, rollout.plan_token_mask)
            with torch.set_grad_enabled(grad and self.text_loss_weight != 0):
                text = model(plan=plan)
        image = (rollout.image_ids, rollout.image_mask, rollout.image_tokens)
        with torch.set_grad_enabled(grad and self.image_loss_weight != 0):
            return text, model(image=image, distribution=distribution or self.logprob)

    def judge(self, rollout: TokenRollout) -> tuple[RewardOutput, dict[str, RewardOutput]]:
        """The reward and the watched ones; a reward that reads another distribution than `logprob` gets its own scoring pass."""
        seen = rollout
        wanted = self.reward.distribution
        if wanted is not None and wanted != self.logprob.removesuffix("_detach_uncond"):
            with torch.no_grad():
                images = [
                    self.stats(self.model, rollout.rows(part), wanted)[1] for part in self.micro_batches(len(rollout))
                ]
            seen = rollout.rows(slice(None))
            seen.image_stats = _concatenate(images)
        with torch.autocast(self.device.type, enabled=False):  # a reward computes in the dtype that it was given
            reward = checked(self.reward(seen), len(rollout), type(self.reward).__name__)
            return reward, {name: checked(watched(rollout), len(rollout), name) for name, watched in self.watch.items()}

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """Advantages `(B,)` of rewards `(B,)`, the rows of a group adjacent."""
        return group_advantages(rewards, self.group_size)

    def update(
        self, rollout: TokenRollout, reference: torch.Tensor | None, advantages: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """One optimizer step on the whole rollout; micro-batches accumulate, and ranks are weighted by their tokens."""
        optimizer = self.optimizers()
        old, mask = _joined(rollout.text_stats, rollout.image_stats)
        text_tokens = mask.shape[1] - rollout.image_tokens.shape[1]
        weights = mask.float()
        weights[:, :text_tokens] *= self.text_loss_weight
        weights[:, text_tokens:] *= self.image_loss_weight
        weights = token_weights(weights, self.loss_reduction, self.group_size)
        total = weights.sum()
        if dist.is_initialized():
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        parts = self.micro_batches(len(rollout))
        collected = []
        for number, part in enumerate(parts):
            logprobs, _ = _joined(*self.stats(self.model, rollout.rows(part)))
            loss = policy_loss(logprobs, old[part], advantages[part], self.clip_range)
            kl = k3(logprobs, reference[part]) if reference is not None else torch.zeros_like(loss)
            costs = (loss + self.kl_coef * kl) * weights[part]
            costs = torch.where(weights[part] != 0, costs, 0.0)  # what weighs nothing may be infinite
            objective = costs.sum() / total
            if number < len(parts) - 1 and dist.is_initialized():
                with self.trainer.strategy.block_backward_sync():
                    self.manual_backward(objective)
            else:
                self.manual_backward(objective)
            collected.append((objective.detach(), (logprobs - old[part]).detach(), kl.detach(), mask[part]))
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        norm = gathered(torch.nn.utils.clip_grad_norm_(learning, self.max_grad_norm or float("inf")))
        if self.nonfinite.allows(norm, self.global_step):
            optimizer.step()
            if self.scheduler_partial is not None:
                self.lr_schedulers().step()
        optimizer.zero_grad(set_to_none=True)
        return {
            "norm": norm,
            "clip_range": self.clip_range,
            "parts": collected,
            "plan_length": text_tokens,
        }

    def micro_batches(self, rows: int) -> list[slice]:
        return [
            slice(first, min(first + self.micro_batch_size, rows)) for first in range(0, rows, self.micro_batch_size)
        ]

    def configure_optimizers(self):
        optimizer = self.optimizer_partial([parameter for _, parameter in self.learning()])
        return optimizer if self.scheduler_partial is None else ([optimizer], [self.scheduler_partial(optimizer)])

    def own_state(self) -> dict:
        return {
            "rollouts_done": self.rollouts_done,
            "reference_sha256": self.start_sha256,
            "skipped": self.nonfinite.skipped,
        }

    def take_own_state(self, saved: dict) -> None:
        if saved["reference_sha256"] not in (None, self.start_sha256):
            raise UserError(
                "this checkpoint was trained from other weights than model.path holds: give the model (and "
                "model.dtype) "
                "that its run started from"
            )
        self.rollouts_done = saved["rollouts_done"]
        self.nonfinite.skipped = saved.get("skipped", 0)


def _joined(text: TokenStats | None, image: TokenStats) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and mask `(B, T + N)` of plan and image tokens side by side."""
    if text is None:
        return image.logprobs, image.mask
    return torch.cat([text.logprobs, image.logprobs], dim=1), torch.cat([text.mask, image.mask], dim=1)


def _concatenate(parts: list[TokenStats]) -> TokenStats:
    names = ("logprobs", "self_certainty", "entropy", "mask")
    return TokenStats(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
