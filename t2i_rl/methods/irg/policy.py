"""GRPO over whole trajectories: plan, picture, reflection and better picture are the actions, the last picture (or its gain over the first) the reward."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from t2i_rl.core.contract_checks import checked
from t2i_rl.core.contracts import Drawn
from t2i_rl.core.errors import UserError
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.numbers import ClipRange, Count, GradientNorm, GroupSize, Seed, Weight, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.methods.irg.rounds import Interleave
from t2i_rl.methods.irg.training import IRG, saved_average
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.methods.policy.loss import group_advantages, importance_ratio, k3, policy_loss
from t2i_rl.methods.trainable import Reference
from t2i_rl.models.autoregressive.segments import BOTH, Segment

REWARDED = ("last", "gain")


class TrajectoryGRPO(IRG):
    """Group-relative policy optimisation of IRG's drawing (beyond arXiv 2509.06945; the objective is DeepSeekMath's, as in `methods.grpo`).

    One training step: `group_size` trajectories for each prompt, drawn as `interleave` says, every round; a
    teacher-forced pass without gradient for the old log-probs, one for the reference; the reward; `updates_per_rollout`
    optimizer steps. Each round is one conversation, as modes 3 and 6 of IRGL have it: the text and the picture of a
    round are its actions, scored by the conditional branch; earlier rounds are context, seen as they were seen. The
    loss is one mean over the tokens of the global batch, `token` in `grpo_loss.token_weights`.

    Args:
        reward: read from pictures alone; `reward_on`: the `last` picture's, or its `gain` over the first's.
        watch: rewards of the last picture that are only logged.
        text_loss_weight, image_loss_weight: weight of a text's token and of a picture's.
        clip_range, kl_coef, group_size, updates_per_rollout: as in `methods.grpo.GRPO`.
        start_from: a checkpoint of method=irg: where training starts, and what the KL is taken to.

    Raises:
        UserError: an option outside its choices.
    """

    learns_from = "prompts"
    stages = ("base_turns", "trained_turns")
    steps = 20
    decide_what_learns = ("trainable", "lora", "start_from")

    def __init__(
        self,
        model: torch.nn.Module,
        reward,
        interleave: Interleave,
        optimizer: partial,
        watch: dict | None = None,
        scheduler: partial | None = None,
        group_size: GroupSize = 8,
        reward_on: str = "last",
        updates_per_rollout: Count = 1,
        clip_range: ClipRange = 0.2,
        kl_coef: Weight = 0.01,
        text_loss_weight: Weight = 1.0,
        image_loss_weight: Weight = 1.0,
        tokens_per_pass: Count = 8192,
        max_grad_norm: GradientNorm | None = 1.0,
        gradient_checkpointing: bool = False,
        start_from: str | None = None,
        trainable: tuple[str, ...] = (r"model\.language_model\.", r"lm_head\."),
        lora: dict | None = None,
        judge: object | None = None,
        on_nonfinite: str = "raise",
        seed: Seed = 0,
    ):
        if start_from:
            begin_at(model, Path(start_from))
        super().__init__(
            model, interleave, optimizer, scheduler, text_loss_weight=text_loss_weight, image_loss_weight=image_loss_weight, ema=0.0,
            tokens_per_pass=tokens_per_pass, max_grad_norm=max_grad_norm, gradient_checkpointing=gradient_checkpointing, trainable=trainable, lora=lora,
            judge=judge, on_nonfinite=on_nonfinite, seed=seed,
        )  # fmt: skip
        self.reward, self.watch = reward, watch or {}
        self.group_size, self.reward_on, self.updates_per_rollout = group_size, reward_on, updates_per_rollout
        self.clip_range, self.kl_coef = clip_range, kl_coef
        self.reference = Reference(model) if kl_coef else None
        self.begun_at = start_from

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.begun_at:
            rank_zero_only(print)(f"no method.start_from: training begins at {self.model.path} as it is; Janus and janus_tiny have not learnt to reflect, which method=irg teaches")  # fmt: skip

    @staticmethod
    def check(options: Mapping) -> None:
        """See `IRG.check`."""
        check_arguments(TrajectoryGRPO, options, "method")
        if options["reward_on"] not in REWARDED:
            raise UserError(f"method.reward_on must be one of {', '.join(REWARDED)}, not {options['reward_on']!r}")
        if options["reward_on"] == "gain" and options["interleave"].rounds < 2:
            raise UserError(
                "method.reward_on=gain compares the last picture with the first: take method.interleave.rounds=2"
            )
        for name in ("text_temperature", "image_temperature"):
            if getattr(options["interleave"], name) != 1:
                raise UserError(
                    f"method.interleave.{name} must be 1: actions are scored at the temperature that they are drawn at"
                )
        if options["interleave"].retries:
            raise UserError(
                "method.interleave.retries must be 0: a text that is written again is no sample of the policy's"
            )
        unused = dict.fromkeys(("drop_prompt", "drop_reflection", "drop_image", "ema"), 0.0)
        IRG.check({**options, **unused})

    @property
    def rollouts_done(self) -> int:
        """Where the stream of prompts goes on."""
        return self.batches_done // self.updates_per_rollout

    def training_step(self, batch: list[tuple[int, Prompt]], index: int) -> None:
        """One rollout of the prompts in `batch` (each with its index in the prompt list) and its updates."""
        started = time.perf_counter()
        prompts = [prompt for _, prompt in batch for _ in range(self.group_size)]
        drawn = self.roll_out(batch)
        rewards, watched = self.judged(drawn, prompts)
        advantages = group_advantages(torch.tensor(rewards["total"]), self.group_size).to(self.device)
        conversations = [each for row in drawn for each in actions(row, self.interleave.seen)]
        owner = torch.tensor([number for number, row in enumerate(drawn) for _ in row.images])
        old = self.scores(conversations)
        reference = None
        if self.reference is not None:
            with self.reference.scoring(self.model) as frozen:
                reference = self.scores(conversations, frozen if frozen is not self.model else None)
        sampled = time.perf_counter()
        updates = [self.update(conversations, old, reference, advantages[owner]) for _ in range(self.updates_per_rollout)]  # fmt: skip
        spread = torch.tensor(rewards["total"]).view(-1, self.group_size).std(dim=1)
        metrics = {
            **{f"reward/{name}": float(np.mean(values)) for name, values in rewards.items()},
            **{f"watch/{name}": float(np.mean(values)) for name, values in watched.items()},
            "reward/zero_std_ratio": float((spread == 0).double().mean()),
            "text/unfinished": float(np.mean([not text.loss for *_, text, _ in conversations])),
            **{f"text/length_turn{turn + 1}": float(np.mean([row.text_tokens[turn] for row in drawn])) for turn in range(self.interleave.rounds)},
            **updates[-1],
            **self.nonfinite.metrics(),
            "train/lr": self.optimizers().param_groups[0]["lr"],
            "time/rollout": sampled - started,
            "time/update": time.perf_counter() - sampled,
        }  # fmt: skip
        self.log_dict(metrics, sync_dist=dist.is_initialized(), batch_size=len(drawn))
        self.log("reward", metrics["reward/total"], prog_bar=True, logger=False)

    @torch.no_grad()
    def roll_out(self, batch: list[tuple[int, Prompt]]) -> list[Trajectory]:
        """`group_size` trajectories of each prompt; a row's randomness is a function of (seed, rollout, prompt index, sample)."""
        self.interleaved.prepare()
        rows = [(number, prompt, sample) for number, prompt in batch for sample in range(self.group_size)]
        seeds = [derive_seed(self.seed, "train", self.rollouts_done, number, sample) for number, _, sample in rows]
        drawn = self.interleave.every_round().run(self.interleaved, [prompt.text for _, prompt, _ in rows], seeds)
        self.interleaved.done()
        return drawn

    def judged(self, drawn: list[Trajectory], prompts: list[Prompt]) -> tuple[dict, dict]:
        """What is trained on with the first and the last picture's own rewards, and the last picture's watched ones."""
        seen = {}
        for name, turn in (("first", 0), ("last", -1)):
            seen[name] = Drawn(
                prompts=prompts,
                seeds=[derive_seed(row.seed, turn) for row in drawn],
                images=np.stack([row.images[turn] for row in drawn]),
                group_size=self.group_size,
            )
        with torch.autocast(self.device.type, enabled=False):
            found = {name: checked(self.reward(each), len(drawn), type(self.reward).__name__).total.tolist() for name, each in seen.items()}  # fmt: skip
            watched = {name: checked(judge(seen["last"]), len(drawn), name).total.tolist() for name, judge in self.watch.items()}  # fmt: skip
        gain = [last - first for first, last in zip(found["first"], found["last"], strict=True)]
        return {"total": found["last"] if self.reward_on == "last" else gain, **found}, watched

    def scores(self, conversations: Sequence[Sequence[Segment]], model=None) -> list[dict[str, torch.Tensor]]:
        """Log-probs of every conversation's actions, by kind, without gradient, under `model` (a frozen twin) or the policy."""
        scorer = self.interleaved if model is None else model.interleaved()
        found: list[dict[str, torch.Tensor]] = [{} for _ in conversations]
        with torch.no_grad():
            passes = self.passes(conversations)
            for part in range(self._most(len(passes))):  # under FSDP the forward passes of ranks have to meet too
                rows = passes[min(part, len(passes) - 1)]
                scored, _ = scorer([[conversations[i] for i in row] for row in rows])
                for kind, (logprobs, owner) in scored.items():
                    for place, number in enumerate(number for row in rows for number in row):
                        found[number][kind] = logprobs[owner == place]
        return found

    def update(self, conversations, old: list[dict], reference: list[dict] | None, advantages: torch.Tensor) -> dict[str, float]:  # fmt: skip
        """One optimizer step; passes accumulate, and ranks are weighted by their tokens. `advantages` `(C,)`, one a conversation."""
        counted = {kind: float(sum(len(row[kind]) for row in old)) for kind in self.loss_weights}
        totals = self._over_ranks(counted)
        weight = sum(self.loss_weights[kind] * count for kind, count in totals.items())
        passes = self.passes(conversations)
        wanted, sums = self._most(len(passes)), dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0)
        for number in range(wanted):
            rows = passes[min(number, len(passes) - 1)]
            once, order = float(number < len(passes)), [i for row in rows for i in row]
            scored, nothing = self.interleaved([[conversations[i] for i in row] for row in rows])
            objective = nothing
            for kind, (logprobs, owner) in scored.items():
                before = torch.cat([old[i][kind] for i in order])
                ratio_loss = policy_loss(logprobs[:, None], before[:, None], advantages[order][owner], self.clip_range)[:, 0]  # fmt: skip
                kl = torch.zeros_like(logprobs) if reference is None else k3(logprobs, torch.cat([reference[i][kind] for i in order]))  # fmt: skip
                share = self.loss_weights[kind] / (weight or 1.0)
                objective = objective + once * share * (ratio_loss + self.kl_coef * kl).sum()
                sums["loss"] += once * share * float(ratio_loss.detach().sum())
                sums["kl"] += once * share * float(kl.detach().sum())
                clipped = (importance_ratio((logprobs - before).detach()) - 1).abs() > self.clip_range
                sums["clip_fraction"] += once * share * float(clipped.sum())
            with self._meeting(number == wanted - 1):
                self.manual_backward(objective * self._ranks())
        norm = self._step()
        return {**{f"train/{name}": value for name, value in self._over_ranks(sums).items()}, "train/grad_norm": float(norm)}  # fmt: skip


def begin_at(model: torch.nn.Module, path: Path) -> None:
    """Put the averaged weights of a run of method=irg into the model, whatever that run trained.

    Raises:
        UserError: it holds weights that the model has not.
    """
    named = dict(model.named_parameters())
    saved = saved_average(path, weights_sha256(model))
    values = {name.split(".", 2)[2]: value for name, value in saved.items()}  # interleaved.<adapter>.<name>
    foreign = sorted(set(values) - set(named))
    if foreign:
        adapters = (
            "was trained with adapters: write it as a model with task=export, and take that with model.path=<folder>"
        )
        raise UserError(f"method.start_from={path} {adapters if 'lora_' in foreign[0] else f'holds {foreign[0]}, which this model has not'}")  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)


def actions(drawn: Trajectory, seen: Callable) -> list[list[Segment]]:
    """A conversation a round, its text and picture to be learnt and the rounds before as context, as far as they were `seen`.

    A text that did not end is context too: a text is learnt with its end, be it empty.
    """
    head, found, texts = [each for each in drawn.segments if each.role == "prompt"], [], 0
    past: list[Segment] = []
    for segment in drawn.segments[len(head) :]:
        if segment.kind == "text":
            said = replace(segment, loss=drawn.text_tokens[texts] > len(segment.drawn_as))  # the end is a token
            texts += 1
            continue
        found.append([*seen([*head, *past]), said, replace(segment, loss=True, seen_by=frozenset())])
        past += [replace(said, loss=False), replace(segment, loss=False, seen_by=BOTH, drawn_as=None)]
    return found
