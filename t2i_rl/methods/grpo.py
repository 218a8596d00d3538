"""GRPO for autoregressive image models: roll out plans and images, score, reward, update. IRIS is this with `reward=nsc`."""

import time
from collections.abc import Mapping
from functools import partial

import lightning as L
import torch
import torch.distributed as dist

from t2i_rl.errors import UserError
from t2i_rl.fsdp import mesh_of, shard
from t2i_rl.hashing import gathered
from t2i_rl.methods.grpo_loss import REDUCTIONS, group_advantages, k3, policy_loss, token_weights
from t2i_rl.methods.grpo_metrics import rollout_metrics, update_metrics
from t2i_rl.methods.trainable import (
    Reference,
    check_lora,
    check_optimizer,
    own_part,
    refuse_rounded_updates,
    select_trainable,
)
from t2i_rl.prompts import Prompt
from t2i_rl.rewards.output import RewardOutput, checked
from t2i_rl.rollout.buffer import Rollout
from t2i_rl.rollout.score import DISTRIBUTIONS
from t2i_rl.rollout.stats import TokenStats
from t2i_rl.seeding import derive_seed


class GRPO(L.LightningModule):
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
        loss_reduction: `token` or `sequence`, see `grpo_loss.token_weights`.
        text_loss_weight, image_loss_weight: weight of a plan token and of an image token; 0 trains one of the two alone (T2I-R1 section 4.3).
        micro_batch_size: rows with a live graph at a time; changes memory, not the gradient.
        gradient_checkpointing: keep only the inputs of layers for the backward pass and compute the rest again.
        offload_reference: keep the frozen copy in the CPU's memory while it is not scoring; without effect under LoRA, which has no copy.
        trainable: regular expressions on parameter names; the default trains trunk, embeddings and language head, not the image head.
        lora: arguments of peft's LoraConfig, or None to train the weights themselves.
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`.
        seed: together with step, prompt and sample it decides every random draw.

    Raises:
        UserError: an option outside its choices.
    """

    trains = frozenset({"autoregressive"})
    learns_from = "prompts"

    def __init__(
        self,
        model: torch.nn.Module,
        reward,
        optimizer: partial,
        watch: dict | None = None,
        group_size: int = 8,
        plan: bool = True,
        logprob: str = "conditional",
        updates_per_rollout: int = 1,
        clip_range: float = 0.2,
        kl_coef: float = 0.01,
        loss_reduction: str = "token",
        text_loss_weight: float = 1.0,
        image_loss_weight: float = 1.0,
        micro_batch_size: int = 32,
        max_grad_norm: float | None = 1.0,
        gradient_checkpointing: bool = False,
        offload_reference: bool = False,
        trainable: tuple[str, ...] = (r"model\.language_model\.", r"lm_head\."),
        lora: dict | None = None,
        scheduler: partial | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.check(locals())
        self.automatic_optimization = False
        self.strict_loading = False
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
        self.rollouts_done = 0

    @staticmethod
    def check(options: Mapping) -> None:
        """Refuse options, by name as in `__init__`, that cannot train; the command line asks before any weight loads.

        Raises:
            UserError: one line that names the option and its choices.
        """
        for name, choices in (("logprob", DISTRIBUTIONS), ("loss_reduction", REDUCTIONS)):
            if options[name] not in choices:
                raise UserError(f"method.{name} must be one of {', '.join(choices)}, not {options[name]!r}")
        for name, least in (("group_size", 2), ("updates_per_rollout", 1), ("micro_batch_size", 1), ("kl_coef", 0)):
            if options[name] < least:
                why = " (advantages compare within a group)" if name == "group_size" else ""
                raise UserError(f"method.{name} must be {least} or more{why}, not {options[name]}")
        if not (options["plan"] and options["text_loss_weight"]) and not options["image_loss_weight"]:
            raise UserError(
                "nothing would be trained: give method.image_loss_weight, or method.text_loss_weight with method.plan=true"
            )
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
        self.log_dict(metrics, sync_dist=dist.is_initialized(), batch_size=len(rollout))
        self.log("reward", metrics["reward/total"], prog_bar=True, logger=False)

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Prompts are text: there is nothing to move."""
        return batch

    @torch.no_grad()
    def roll_out(self, batch: list[tuple[int, Prompt]]) -> Rollout:
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
        return Rollout(
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
    def score(self, rollout: Rollout) -> torch.Tensor | None:
        """Fill in the rollout policy's statistics; returns the reference's log-probs `(B, T + N)`, None without a KL."""
        chunks = [rollout.rows(part) for part in self.micro_batches(len(rollout))]
        scored = [self.stats(self.model, chunk) for chunk in chunks]
        rollout.text_stats = _concatenate([text for text, _ in scored]) if self.plan else None
        rollout.image_stats = _concatenate([image for _, image in scored])
        if self.reference is None:
            return None
        with self.reference.scoring(self.model) as reference:
            return torch.cat([_joined(*self.stats(reference, chunk))[0] for chunk in chunks])

    def stats(self, model, rollout: Rollout, distribution: str | None = None) -> tuple[TokenStats | None, TokenStats]:
        """Teacher-forced statistics of plan and image tokens under `model`, with gradient where grad mode is on and it is wanted."""
        grad, text = torch.is_grad_enabled(), None
        if self.plan:
            plan = (rollout.plan_ids, rollout.plan_mask, rollout.plan_tokens, rollout.plan_token_mask)
            with torch.set_grad_enabled(grad and self.text_loss_weight != 0):
                text = model(plan=plan)
        image = (rollout.image_ids, rollout.image_mask, rollout.image_tokens)
        with torch.set_grad_enabled(grad and self.image_loss_weight != 0):
            return text, model(image=image, distribution=distribution or self.logprob)

    def judge(self, rollout: Rollout) -> tuple[RewardOutput, dict[str, RewardOutput]]:
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
        self, rollout: Rollout, reference: torch.Tensor | None, advantages: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """One optimizer step on the whole rollout; micro-batches accumulate, and ranks are weighted by their tokens."""
        optimizer = self.optimizers()
        old, mask = _joined(rollout.text_stats, rollout.image_stats)
        weights = token_weights(mask, self.loss_reduction)
        text_tokens = mask.shape[1] - rollout.image_tokens.shape[1]
        weights[:, :text_tokens] *= self.text_loss_weight
        weights[:, text_tokens:] *= self.image_loss_weight
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
            objective = ((loss + self.kl_coef * kl) * weights[part]).sum() / total
            if number < len(parts) - 1 and dist.is_initialized():
                with self.trainer.strategy.block_backward_sync():
                    self.manual_backward(objective)
            else:
                self.manual_backward(objective)
            collected.append((objective.detach(), (logprobs - old[part]).detach(), kl.detach(), mask[part]))
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        norm = gathered(torch.nn.utils.clip_grad_norm_(learning, self.max_grad_norm or float("inf")))
        if not torch.isfinite(norm):
            raise ValueError(f"gradient norm is {norm.item()} at optimizer step {self.global_step}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.scheduler_partial is not None:
            self.lr_schedulers().step()
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
        optimizer = self.optimizer_partial([p for p in self.parameters() if p.requires_grad])
        return optimizer if self.scheduler_partial is None else ([optimizer], [self.scheduler_partial(optimizer)])

    def state_dict(self, *args, **kwargs) -> dict:
        """Only what learns: everything else is the initial model, which a checkpoint names by its hash."""
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in learning}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["grpo"] = {
            "rollouts_done": self.rollouts_done,
            "reference_sha256": self.reference.sha256 if self.reference else None,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = own_part(checkpoint, "grpo")
        if self.reference is not None and saved["reference_sha256"] not in (None, self.reference.sha256):
            raise UserError(
                "this checkpoint was trained from other weights than model.path holds: give the model that its run started from"
            )
        self.rollouts_done = saved["rollouts_done"]


def _joined(text: TokenStats | None, image: TokenStats) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and mask `(B, T + N)` of plan and image tokens side by side."""
    if text is None:
        return image.logprobs, image.mask
    return torch.cat([text.logprobs, image.logprobs], dim=1), torch.cat([text.mask, image.mask], dim=1)


def _concatenate(parts: list[TokenStats]) -> TokenStats:
    names = ("logprobs", "self_certainty", "entropy", "mask")
    return TokenStats(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
