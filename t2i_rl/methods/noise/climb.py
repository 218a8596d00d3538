"""`method=noise_opt`: the noise climbs a reward, held Gaussian by a regulariser (MPGR, arXiv 2509.07027)."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from t2i_rl.core.choices import choices, load_yaml
from t2i_rl.core.contract_checks import reward_classes
from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import ClimbingRate, Count, Decay, GradientNorm, Positive, Weight, check_arguments, check_value
from t2i_rl.core.places import CONF
from t2i_rl.core.seeding import derive_seed
from t2i_rl.gaussianity.moments import rows
from t2i_rl.gaussianity.regularizer import Regularizer
from t2i_rl.methods.noise.base import NoiseMethod
from t2i_rl.methods.noise.cases import Case, Track
from t2i_rl.models.diffusion.base import LatentDiffusion
from t2i_rl.models.diffusion.noise_to_image import noise_to_image


class NoiseOptimization(NoiseMethod):
    """Each case climbs `reward - regularizer` from its own noise, with an optimizer, a clip, shuffles and a stop of its
    own; the batch shares one graph.

    Args:
        regularizer: penalties, and the set that noise is put back into after a step.
        optimizer: a partial, `optimizer([noise])`; LBFGS steps along its own direction once an iteration.
        iterations: gradient steps; the last iterate is judged too.
        balance: the regulariser's gradient is scaled to this many times the reward's norm, a case at a time; None adds
            both as they are.
        max_grad_norm: of a case's whole gradient, after the sum.
        patience: stop a case whose target has not risen by `min_rise` for so many iterations; None: never.
        held_out, held_out_patience: stop a case when this watched judge has been below its best for so many
            measurements in a row.

    Raises:
        UserError: an option outside its range.
    """

    needs_gradients = True
    ends = ("best", "last")

    def __init__(
        self,
        model: LatentDiffusion,
        reward: Reward,
        watch: Mapping[str, Reward],
        regularizer: Regularizer,
        optimizer: partial,
        iterations: Count = 50,
        balance: Positive | None = 1.0,
        max_grad_norm: GradientNorm | None = 0.01,
        patience: Count | None = None,
        min_rise: Weight = 0.0,
        held_out: str | None = None,
        held_out_patience: Count = 3,
        **shared: Any,
    ):
        super().__init__(model, reward, watch, **shared)
        self.regularizer, self.optimizer_partial, self.iterations = regularizer, optimizer, iterations
        self.balance, self.max_grad_norm = balance, max_grad_norm
        self.patience, self.min_rise = patience, min_rise
        self.held_out, self.held_out_patience = held_out, held_out_patience

    @staticmethod
    def check(options: Mapping) -> None:
        """Refuse options, by name as in `__init__`, that cannot optimise; the command line asks before any weight
        loads.

        Raises:
            UserError: one line that names the option.
        """
        NoiseMethod.check(options)
        check_arguments(NoiseOptimization, options, "method")
        try:
            defaults = options["optimizer"]([torch.nn.Parameter(torch.zeros(1))]).defaults
        except (TypeError, ValueError) as error:
            raise UserError(f"method.optimizer: {error}") from error
        check_value(defaults["lr"], ClimbingRate, "method.optimizer.lr")
        check_value(defaults.get("momentum", 0), Decay, "method.optimizer.momentum")

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """See `Method.check_run`; the reward has to have a gradient."""
        super().check_run(cfg, training)
        held_out = cfg.method.get("held_out")
        if held_out is not None and not cfg.watch.get(held_out):
            raise UserError(
                f"method.held_out={held_out} is not watched; there are {', '.join(cfg.watch) or 'none'} (watch.<name>)"
            )
        if cfg.reward.get("normalize", "none") != "none":
            raise UserError("reward.normalize=group has no gradient, and a case no group: take reward.normalize=none")
        blind = [kind.__name__ for kind in reward_classes(cfg.reward) if not kind.differentiable]
        if blind:
            names = ", ".join(name for name in choices("reward") if _has_gradient(name))
            raise UserError(
                f"{cls.__name__} follows the reward's gradient, which {blind[0]} has not: take one of reward={names}, "
                "or method=noise_search"
            )

    @property
    def length(self) -> int:
        return self.iterations + 1

    def search(self, cases: list[Case]) -> list[Track]:
        tracks = [Track(case) for case in cases]
        initial = self.first_noise(cases)
        noises = [noise[None].clone().requires_grad_() for noise in initial]
        optimizers = [self.optimizer_partial([noise]) for noise in noises]
        shuffles = [torch.Generator(self.device).manual_seed(derive_seed(case.seed, "shuffles")) for case in cases]
        for optimizer, case in zip(optimizers, cases, strict=True):
            if hasattr(optimizer, "generator"):
                optimizer.generator.manual_seed(derive_seed(case.seed, "langevin"))
        active = list(range(len(cases)))
        for step in range(self.iterations + 1):
            last = step == self.iterations
            climbing = [tracks[i] for i in active]
            gradients = self._iterate(climbing, [noises[i] for i in active], [shuffles[i] for i in active], step, last)
            if gradients is None:  # the last iterate is judged, and goes no further
                break
            before = torch.cat([noises[i].detach() for i in active])
            for row, i in enumerate(active):
                noises[i].grad = gradients[row : row + 1]
                optimizers[i].step(partial(gradients.new_zeros, ()))
            self._constrain([noises[i] for i in active], initial[active])
            moved = rows(torch.cat([noises[i].detach() for i in active]) - before).square().mean(dim=1).sqrt()
            for track, distance in zip(climbing, moved.tolist(), strict=True):
                if not math.isfinite(distance):
                    raise UserError(
                        f"the noise of {track.case.prompt.text!r} is not finite after step {step}: lower "
                        "method.optimizer.lr"
                    )
                track.rows[-1]["step_rms"] = distance
            active = [i for i in active if not self._stops(tracks[i])]
            if not active:
                break
        return tracks

    def _iterate(
        self, tracks: list[Track], noises: list[torch.Tensor], shuffles: list[torch.Generator], step: int, last: bool
    ) -> torch.Tensor | None:
        """Draw, judge and write down one step; the gradient to descend `(B, ...)`, None after the last."""
        cases = [track.case for track in tracks]
        noise = torch.cat(noises)
        with torch.set_grad_enabled(not last):
            texts, empty = self.text_of(cases), self.empty_of(len(cases))
            pixels = noise_to_image(self.model, noise, texts, empty, self.eta, self.checkpointing, self.last_step_noise)
            target = self.target_of(pixels, cases)
        penalty, parts = self.regularizer(noise, shuffles)
        start = torch.stack([track.noises["initial"] for track in tracks]) if step else noise.detach()
        more = {
            "penalty": penalty,
            "cosine_to_start": torch.cosine_similarity(rows(noise.detach()), rows(start.to(noise)), dim=1),
        }
        more |= {f"penalty/{name}": value for name, value in parts.items()}
        gradient = None
        if not last:
            of_target = torch.autograd.grad(-target.sum(), noises)
            gradient, norms = self.combined(torch.cat(of_target), penalty, noises)
            more |= norms
        self.note(tracks, step, noise.detach(), pixels.detach(), target.detach(), **more)
        return gradient

    def combined(
        self, of_target: torch.Tensor, penalty: torch.Tensor, noises: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The gradients of target and penalty as one `(B, ...)`: balanced, put onto the constraint's set if it asks for
        that, and clipped, a case at a time; and their norms `(B,)`.

        Raises:
            UserError: it is not finite.
        """
        total, norms = of_target, {"grad/target": rows(of_target).norm(dim=1)}
        if penalty.requires_grad:
            of_penalty = torch.cat(torch.autograd.grad(penalty.sum(), noises))
            norms["grad/penalty"] = rows(of_penalty).norm(dim=1)
            if self.balance is not None:
                factors = self.balance * norms["grad/target"] / norms["grad/penalty"].clamp(min=1e-12)
                of_penalty = _scaled(of_penalty, factors)
            total = of_target + of_penalty
        constraint = self.regularizer.constraint
        if constraint is not None and constraint.project_gradient:
            total = constraint(total, total)
        if self.max_grad_norm is not None:
            total = _scaled(total, (self.max_grad_norm / rows(total).norm(dim=1).clamp(min=1e-12)).clamp(max=1.0))
        broken = (~rows(total).norm(dim=1).isfinite()).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f"the gradient of case {broken[0]} of the batch is not finite: take model.dtype=bfloat16 or float32 "
                "(not float16), or a lower method.optimizer.lr; finished cases stay, and the same command with this "
                "hydra.run.dir goes on"
            )
        return total, norms

    @torch.no_grad()
    def _constrain(self, noises: list[torch.Tensor], initial: torch.Tensor) -> None:
        if self.regularizer.constraint is None:
            return
        held = self.regularizer.constraint(torch.cat([noise.detach() for noise in noises]), initial)
        for noise, value in zip(noises, held.split(1), strict=True):
            noise.copy_(value)

    def _stops(self, track: Track) -> bool:
        """Whether a case has reached a plateau, or its held-out judge has turned."""
        targets, name = [row["target"] for row in track.rows], f"watch/{self.held_out}"
        judged = [row[name] for row in track.rows if name in row]
        if self.patience is not None and len(targets) > self.patience:
            flat = max(targets[-self.patience :]) <= max(targets[: -self.patience]) + self.min_rise
            track.stopped = "plateau" if flat else None
        if self.held_out is not None and len(judged) > self.held_out_patience:
            falling = max(judged[-self.held_out_patience :]) < max(judged[: -self.held_out_patience])
            track.stopped = "held-out decline" if falling else track.stopped
        return track.stopped is not None


def _has_gradient(reward: str) -> bool:
    """Whether every class of a config of the group `reward` has one."""
    config = load_yaml(CONF / "reward" / f"{reward}.yaml")
    parts = [item.split("@")[0] for item in config.get("defaults", ()) if "@parts." in item]
    if parts:
        return all(map(_has_gradient, parts))
    if "_target_" not in config:
        return False
    kind: type[Reward] = get_class(config["_target_"])
    return kind.differentiable


def _scaled(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return x * factors.view(-1, *[1] * (x.ndim - 1)).to(x)
