"""GRPO for autoregressive image models: roll out, score, reward, update; IRIS is this with `reward=nsc`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig

from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.fsdp import mesh_of, shard
from t2i_rl.core.numbers import ClipRange, Count, GradientNorm, GroupSize, Seed, Weight, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.methods.policy.base import Actions, PolicyMethod, Step
from t2i_rl.methods.policy.loss import REDUCTIONS
from t2i_rl.methods.policy.token_metrics import token_metrics
from t2i_rl.methods.step import NonFinite, check_optimizer
from t2i_rl.methods.trainable import (
    check_dtype,
    check_lora,
    check_trainable,
    recompute_layers,
    refuse_rounded_updates,
    select_trainable,
)
from t2i_rl.models.autoregressive.engine.score import DISTRIBUTIONS
from t2i_rl.models.autoregressive.engine.stats import TokenStats
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.autoregressive.rollout import TokenRollout


@dataclass(kw_only=True)
class TokenActions(Actions):
    """Tokens of plans and images, with the statistics that their log-probs are of; `text` is None without plans."""

    text: TokenStats | None
    image: TokenStats


class GRPO(PolicyMethod[Janus, TokenRollout, TokenActions]):
    """Group-relative policy optimisation over plan tokens and image tokens (T2I-R1 section 3.3, IRIS section 3).

    A row is a plan and the image that is drawn from it under guidance; its actions are the tokens of both.

    Args:
        model: an adapter of family `autoregressive`.
        reward: what is trained on; it reads a `TokenRollout`.
        logprob: whose log-prob an image token gets: `conditional` (T2I-R1), `guided` (the sampler's own: the unbiased
            one), `guided_detach_uncond`. See docs/logprob.md.
        plan: write a plan and draw from it; else draw straight from the prompt.
        text_loss_weight, image_loss_weight: weight of a plan token and of an image token; 0 trains one of the two alone
            (T2I-R1 section 4.3).
        gradient_checkpointing: keep only the inputs of layers for the backward pass and compute the rest again.
        offload_reference: keep the frozen copy in the CPU's memory while it is not scoring; without effect under LoRA,
            which has no copy.
        trainable: regular expressions on parameter names; the default trains trunk, embeddings and language head, not
            the image head.
        lora: arguments of peft's LoraConfig, or None to train the weights themselves.
        watch, optimizer, scheduler, group_size, updates_per_rollout, clip_range, kl_coef, loss_reduction,
            micro_batch_size, max_grad_norm, on_nonfinite, seed: see `PolicyMethod`.

    Raises:
        UserError: an option outside its choices.
    """

    trains = frozenset({"autoregressive"})
    draws = TokenRollout
    keeps_as, counter_key, hash_key = "grpo", "rollouts_done", "reference_sha256"
    weights_come_from = "the model (and model.dtype)"
    decide_what_learns = ("trainable", "lora", "plan", "text_loss_weight")
    model: Janus

    def __init__(
        self,
        model: Janus,
        reward: Reward | None,
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
        self.check(locals())
        writes = plan and text_loss_weight != 0
        patterns = [pattern for pattern in trainable if writes or not pattern.startswith("lm_head")]
        select_trainable(model.model, patterns, lora)
        refuse_rounded_updates(model)
        if gradient_checkpointing:
            recompute_layers(model)
        super().__init__(
            model,
            reward,
            optimizer,
            watch,
            scheduler,
            loss_weights={"text": text_loss_weight, "image": image_loss_weight},
            group_size=group_size,
            updates_per_rollout=updates_per_rollout,
            clip_range=clip_range,
            kl_coef=kl_coef,
            loss_reduction=loss_reduction,
            micro_batch_size=micro_batch_size,
            offload_reference=offload_reference,
            max_grad_norm=max_grad_norm,
            on_nonfinite=on_nonfinite,
            seed=seed,
        )
        self.model, self.plan, self.logprob = model, plan, logprob

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
                "nothing would be trained: give method.image_loss_weight, or method.text_loss_weight with "
                "method.plan=true"
            )
        NonFinite.check(options.get("on_nonfinite", "raise"))
        check_trainable(options["trainable"])
        check_lora(options["lora"])
        check_optimizer(options["optimizer"], options["scheduler"])

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """See `Method.check_run`."""
        super().check_run(cfg, training)
        check_dtype(cfg)

    def configure_model(self) -> None:
        """Shard policy and reference where the strategy is FSDP."""
        mesh = mesh_of(self.trainer)
        if mesh is not None:
            shard(self.model, mesh)
            if self.reference is not None and self.reference.twin is not None:
                shard(self.reference.twin, mesh)

    def roll_out(self, batch: list[tuple[int, Prompt]]) -> TokenRollout:
        """Sample a plan and an image for each row."""
        prompts, seeds = self.rows(batch)
        self.model.prepare()
        texts, plans = [prompt.text for prompt in prompts], [""] * len(prompts)
        plan_fields: dict[str, Any] = {}
        if self.plan:
            (ids, mask), (tokens, token_mask), plans = self.model.draw_plans(texts, seeds)
            plan_fields = {"plan_ids": ids, "plan_mask": mask, "plan_tokens": tokens, "plan_token_mask": token_mask}
            plan_fields["plan_truncated"] = ~((tokens == self.model.special["eos"]) & token_mask).any(dim=1)
        (ids, mask), drawn = self.model.draw_images(texts, plans, [seed + 1 for seed in seeds])
        self.model.engine.rollout_done()
        wants_images = any(reward.needs_images for reward in (self.reward, *self.watch.values()))
        return TokenRollout(
            prompts=prompts,
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
            **plan_fields,
        )

    def logprobs(self, rollout: TokenRollout, part: slice, model: Janus) -> TokenActions:
        """The tokens of some rows, plans beside images: `(b, T + N)`."""
        text, image = self.stats(rollout.rows(part), model)
        scored = [stats for stats in (text, image) if stats is not None]
        plan_length = 0 if text is None else text.logprobs.shape[1]
        kinds = {"text": (slice(None), slice(plan_length))} if plan_length else {}
        return TokenActions(
            logprobs=torch.cat([stats.logprobs for stats in scored], dim=1),
            mask=torch.cat([stats.mask for stats in scored], dim=1),
            owner=torch.arange(len(rollout), device=image.mask.device)[part],
            kinds=kinds | {"image": (slice(None), slice(plan_length, None))},
            text=text,
            image=image,
        )

    def stats(
        self, rollout: TokenRollout, model: Janus, distribution: str | None = None
    ) -> tuple[TokenStats | None, TokenStats]:
        """Teacher-forced statistics of plan and image tokens under `model`, with gradient where grad mode is on and the
        tokens count in the loss."""
        grad, text = torch.is_grad_enabled(), None
        if self.plan:
            plan = (rollout.plan_ids, rollout.plan_mask, rollout.plan_tokens, rollout.plan_token_mask)
            with torch.set_grad_enabled(grad and self.loss_weights["text"] != 0):
                text = model(plan=plan)
        image = (rollout.image_ids, rollout.image_mask, rollout.image_tokens)
        with torch.set_grad_enabled(grad and self.loss_weights["image"] != 0):
            return text, model(image=image, distribution=distribution or self.logprob)

    @torch.no_grad()
    def score(self, rollout: TokenRollout, passes: Sequence[slice]) -> list[TokenActions]:
        """See `PolicyMethod.score`; the rollout keeps the statistics of its own policy, which intrinsic rewards
        read."""
        old = super().score(rollout, passes)
        texts = [actions.text for actions in old if actions.text is not None]
        rollout.text_stats = _concatenate(texts) if texts else None
        rollout.image_stats = _concatenate([actions.image for actions in old])
        return old

    @torch.no_grad()
    def as_read(self, reward: Reward, rollout: TokenRollout) -> TokenRollout:
        """A reward that reads another distribution of image tokens than `logprob` gets its own scoring pass."""
        if reward.distribution in (None, self.logprob.removesuffix("_detach_uncond")):
            return rollout
        parts = [rollout.rows(part) for part in self.passes(rollout)]
        read = rollout.rows(slice(None))
        read.image_stats = _concatenate([self.stats(part, self.model, reward.distribution)[1] for part in parts])
        return read

    def metrics(self, step: Step[TokenRollout]) -> dict[str, float]:
        """See `PolicyMethod.metrics`; and what was written and drawn, and how fast."""
        return super().metrics(step) | token_metrics(step)


def _concatenate(parts: list[TokenStats]) -> TokenStats:
    names = ("logprobs", "self_certainty", "entropy", "mask")
    return TokenStats(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
