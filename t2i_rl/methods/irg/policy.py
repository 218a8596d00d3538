"""GRPO over whole trajectories: both texts and both pictures are actions, and the last picture is rewarded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from t2i_rl.core.contract_checks import checked, reward_classes
from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.numbers import ClipRange, Count, GradientNorm, GroupSize, Seed, Weight, check_arguments
from t2i_rl.core.prompts import Prompt
from t2i_rl.methods.irg.drawing import DrawsInTurns
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.irg.training import IRG, saved_average
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.methods.policy.base import Actions, PolicyMethod, Step, Update
from t2i_rl.methods.ranks import rank_count, sum_over_ranks
from t2i_rl.methods.trainable import recompute_layers, select_trainable
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.autoregressive.segments import BOTH, Segment

REWARDED = ("last", "gain")


@dataclass(kw_only=True)
class TrajectoryRollout(Drawn):
    """`B` rows of trajectories; `images` are their last pictures.

    trajectories: `B`, as they were drawn.
    conversations: `C`, one a round of each row: its actions are learnt, the rounds before it are context.
    owner: the row of each conversation.
    """

    trajectories: list[Trajectory]
    conversations: list[list[Segment]]
    owner: list[int]


class TrajectoryGRPO(DrawsInTurns, PolicyMethod[Janus, TrajectoryRollout, Actions]):
    """Group-relative policy optimisation of IRG's drawing (beyond arXiv 2509.06945; the objective is DeepSeekMath's).

    Trajectories are drawn as `interleave` says, every round. Each round is one conversation, as modes 3 and 6 of IRGL
    have it: the text and the picture of a round are its actions, scored by the conditional branch; earlier rounds are
    context, seen as they were seen. The loss is one mean over the tokens of the global batch.

    Args:
        reward: read from pictures alone; `reward_on`: the `last` picture's, or its `gain` over the first's.
        watch: rewards of the last picture that are only logged.
        interleave, judge: see `IRG`.
        text_loss_weight, image_loss_weight: weight of a text's token and of a picture's.
        tokens_per_pass: places with a live graph at a time; changes memory, not the gradient.
        start_from: a checkpoint of method=irg: where training starts, and what the KL is taken to.
        optimizer, scheduler, group_size, updates_per_rollout, clip_range, kl_coef, max_grad_norm, on_nonfinite, seed:
            see `PolicyMethod`.

    Raises:
        UserError: an option outside its choices.
    """

    trains = frozenset({"autoregressive"})
    stages = ("base_turns", "trained_turns")
    steps = 20
    keeps_as, counter_key = "irg", "rollouts_done"
    weights_come_from = "the model (and method.start_from)"
    decide_what_learns = ("trainable", "lora", "start_from")

    def __init__(
        self,
        model: Janus,
        reward: Reward | None,
        interleave: Rounds,
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
        judge: Reward | None = None,
        on_nonfinite: str = "raise",
        seed: Seed = 0,
    ):
        if start_from:
            begin_at(model, Path(start_from))
        select_trainable(model.model, trainable, lora)
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
            max_grad_norm=max_grad_norm,
            on_nonfinite=on_nonfinite,
            seed=seed,
        )
        self.interleaved, self.interleave, self.tokens_per_pass = model.interleaved(), interleave, tokens_per_pass
        self.reward_on, self.start_from, self.judge = reward_on, start_from, judge
        twin = self.reference.twin if self.reference is not None else None
        # in a tuple, so that it is no submodule: like its model it is neither trained nor saved
        self._frozen = (twin.interleaved() if twin is not None else None,)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.start_from:
            rank_zero_only(print)(
                f"no method.start_from: training begins at {self.model.path} as it is; Janus and janus_tiny have not "
                "learnt to reflect, which method=irg teaches"
            )

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

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """See `Method.check_run`; it judges pictures and reads nothing else of what it draws."""
        super().check_run(cfg, training)
        judges = {"reward": cfg.reward, **{f"watch.{name}": judge for name, judge in cfg.watch.items()}}
        for where, judge in judges.items():
            for kind in reward_classes(judge):
                if not issubclass(cls.draws, kind.reads):
                    fix = (
                        "take reward=oracle, or another that reads pictures"
                        if where == "reward"
                        else f"remove it (~{where})"
                    )
                    raise UserError(
                        f"{cls.__name__} judges pictures alone, and {where} ({kind.__name__}) reads more than them, or "
                        f"none: {fix}"
                    )

    def roll_out(self, batch: list[tuple[int, Prompt]]) -> TrajectoryRollout:
        """Draw a trajectory for each row, every round of it."""
        prompts, seeds = self.rows(batch)
        self.interleaved.prepare()
        drawn = self.interleave.every_round().run(self.interleaved, [prompt.text for prompt in prompts], seeds)
        self.interleaved.done()
        return TrajectoryRollout(
            **self.pictures(drawn, prompts, turn=-1),
            trajectories=drawn,
            conversations=[segments for row in drawn for segments in actions_of(row, self.interleave.seen)],
            owner=[number for number, row in enumerate(drawn) for _ in row.images],
        )

    def pictures(self, drawn: Sequence[Trajectory], prompts: list[Prompt], turn: int) -> dict:
        """One turn's pictures of each trajectory as fields of a `Drawn`."""
        return {
            "prompts": prompts,
            "seeds": [row.seed_of(turn) for row in drawn],
            "images": np.stack([row.images[turn] for row in drawn]),
            "group_size": self.group_size,
        }

    def passes(self, rollout: TrajectoryRollout) -> list[list[list[int]]]:
        """Rows of conversations, by number."""
        return self.packed(rollout.conversations)

    def logprobs(self, rollout: TrajectoryRollout, part: list[list[int]], model: Janus) -> Actions:
        """The tokens of texts, then those of pictures, each a row of its own: `(n, 1)`."""
        scorer = self.interleaved if model is self.model else self._frozen[0]
        assert scorer is not None  # with adapters, the reference is the model itself
        scored, zero = scorer([[rollout.conversations[number] for number in row] for row in part])
        (text, text_owner), (image, image_owner) = scored["text"], scored["image"]
        logprobs = torch.cat([text, image])[:, None]
        rows = torch.tensor([rollout.owner[number] for row in part for number in row], device=logprobs.device)
        return Actions(
            logprobs=logprobs,
            mask=torch.ones_like(logprobs, dtype=torch.bool),
            owner=rows[torch.cat([text_owner, image_owner])],
            kinds={"text": slice(len(text)), "image": slice(len(text), None)},
            zero=zero,
        )

    def rewards(self, rollout: TrajectoryRollout) -> RewardOutput:
        """What is trained on, with the first and the last picture's own rewards."""
        before = Drawn(**self.pictures(rollout.trajectories, rollout.prompts, turn=0))
        name = type(self.reward).__name__
        first, last = (checked(self.reward(drawn), len(drawn), name).total.double() for drawn in (before, rollout))
        return RewardOutput(last if self.reward_on == "last" else last - first, {"first": first, "last": last})

    def advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        """See `PolicyMethod.advantages`; from rewards in float32, as runs of this method have always had them."""
        return super().advantages(rewards.float())

    def metrics(self, step: Step[TrajectoryRollout]) -> dict[str, float]:
        """The last update, each action at its weight in the loss; and what was written."""
        drawn, update = step.rollout.trajectories, step.updates[-1]
        texts = [text for *_, text, _ in step.rollout.conversations]
        return {
            **{f"train/{name}": value for name, value in self.weighted_means(update).items()},
            "train/grad_norm": float(update.norm),
            "text/unfinished": float(np.mean([not text.loss for text in texts])),
            **{
                f"text/length_turn{turn + 1}": float(np.mean([row.text_tokens[turn] for row in drawn]))
                for turn in range(self.interleave.rounds)
            },
        }

    def weighted_means(self, update: Update) -> dict[str, float]:
        """Loss, KL and share of clipped actions of one update, over the actions of all ranks."""
        sums, total = dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0), float(update.total) * rank_count()
        for record in update.passes:
            clipped = (record.ratio - 1).abs() > self.clip_range
            for kind, place in record.actions.kinds.items():
                share = self.loss_weights[kind] / total
                sums["loss"] += share * float(record.loss[place].sum())
                sums["kl"] += share * float(record.kl[place].sum())
                sums["clip_fraction"] += share * float(clipped[place].sum())
        return sum_over_ranks(sums, self.device)

    def take_own_state(self, saved: dict) -> None:
        """Older checkpoints count updates, as `batches_done`."""
        rollouts = saved.get("batches_done", 0) // self.updates_per_rollout
        super().take_own_state({"rollouts_done": rollouts, **saved})


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
        adapters = "was trained with adapters: write it as a model with task=export, and take that with model.path"
        what = f"{adapters}=<folder>" if "lora_" in foreign[0] else f"holds {foreign[0]}, which this model has not"
        raise UserError(f"method.start_from={path} {what}")
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)


def actions_of(drawn: Trajectory, seen: Callable[[Sequence[Segment]], Sequence[Segment]]) -> list[list[Segment]]:
    """A conversation a round, its text and picture to be learnt and the rounds before as context, as far as they were
    `seen`.

    A text that did not end is context too: a text is learnt with its end, be it empty.
    """
    head = [segment for segment in drawn.segments if segment.role == "prompt"]
    conversations: list[list[Segment]] = []
    past: list[Segment] = []
    texts = 0
    for segment in drawn.segments[len(head) :]:
        if segment.kind == "text":
            text = replace(segment, loss=drawn.text_tokens[texts] > len(segment.drawn_as))  # the end is a token
            texts += 1
            continue
        context = seen([*head, *past])
        conversations.append([*context, text, replace(segment, loss=True, seen_by=frozenset())])
        past += [replace(text, loss=False), replace(segment, loss=False, seen_by=BOTH, drawn_as=None)]
    return conversations
