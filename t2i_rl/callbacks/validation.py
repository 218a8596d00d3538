"""Draw held-back prompts while training, judge them, and keep the checkpoint that judged best on them.

The test split chooses nothing: its prompts are never drawn here.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.contract_checks import checked, features_of, measured_of, verdicts_of
from t2i_rl.core.contracts import Benchmark, Drawn, Judging, Reward, Verdict
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_weights
from t2i_rl.core.numbers import Count
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.fid import frechet_distance


@dataclass(frozen=True)
class Row:
    """What was found of one picture.

    scores: by judge. verdict, measured: of the benchmark, where there is one. features: where the Frechet distance is
    taken.
    """

    scores: dict[str, float]
    tag: str = ""
    verdict: Verdict | None = None
    measured: dict[str, float] | None = None
    features: np.ndarray | None = None


class Validate(Judging, L.Callback):
    """Before the first step (without what learns, where it can be switched off), every `every_n_steps`, and at the end.

    Args:
        benchmark: its prompts are drawn once each, with the same seeds every time, and judged: `val/overall`,
            `val/score`, `val/<task>` and `val/<column>`; None takes the data module's `validation` prompts and only the
            judges.
        judges: rewards that read pictures, by name: `val/<name>`.
        fid: whether to log the Frechet distance of the benchmark's features to its reference features (`val/fid`); None
            where it has some. An object with `features` and `reference_features`, such as `InceptionFeatures`, takes
            the place of the benchmark's.
        best: the logged metric by which `checkpoints/best.ckpt` is chosen, the largest, or the smallest where less is
            better (`val/fid`, columns that say so); it is what the run ends with. None keeps the last.
        batch_size: images drawn together.

    A task whose accuracy falls below the untouched model's by more than its standard error is said once: a metric may
    rise while one of its tasks pays.
    """

    def __init__(
        self,
        folder: str,
        benchmark: Benchmark | None = None,
        judges: dict[str, Reward | None] | None = None,
        every_n_steps: Count = 50,
        fid: bool | object | None = None,
        best: str | None = "val/overall",
        batch_size: Count = 64,
    ):
        self.folder, self.benchmark, self.judges = Path(folder), benchmark, judges or {}
        self.every_n_steps, self.best, self.batch_size, self.fid = every_n_steps, best, batch_size, fid
        self.drawn_at, self.best_value, self.best_step, self.base = -1, None, None, None
        self.warned: list[str] = []

    @cached_property
    def features(self) -> object | None:
        """What the Frechet distance is taken on; None where it is not taken."""
        if self.fid is None:
            has_some = self.benchmark is not None and self.benchmark.reference_features() is not None
            return self.benchmark if has_some else None
        return self.benchmark if self.fid is True else self.fid or None

    def check(self, where: str) -> None:
        """Whether the Frechet distance can be taken, and `best` will be measured.

        Raises:
            UserError: one line that names the setting, and what it may be.
        """
        if self.fid is True and (self.benchmark is None or self.benchmark.reference_features() is None):
            lacking = "there is no benchmark" if self.benchmark is None else f"{type(self.benchmark).__name__} has none"
            raise UserError(
                f"{where}.fid=true compares with reference_features(), and {lacking}: set {where}.fid=false"
            )
        measured = self._names()
        if self.best is not None and self.best not in measured:
            raise UserError(f"{where}.best={self.best} is not measured; choose from {', '.join(measured)}, or null")

    def _names(self) -> list[str]:
        """What will be measured, as it is logged."""
        names = [*self.judges, *(["fid"] if self.features is not None else [])]
        if self.benchmark is not None:
            tags = {prompt.tag for prompt in self.benchmark.prompts()}
            names += ["overall", "score", *sorted(tags)]
            names += [column.name for column in self.benchmark.columns if tags & set(column.tasks or tags)]
        return [f"val/{name}" for name in names]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        tokens = module.model.attached
        if self.base is None and (tokens is not None or trainer.global_step == 0):
            with tokens.disabled() if tokens is not None else nullcontext():
                self.base = self._measure(trainer, module)
            self._log(trainer, {name.replace("val/", "val_base/", 1): value for name, value in self.base.items()})

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        at_the_end = 0 < trainer.max_steps <= trainer.global_step  # judged before it is saved: a run may stop in it
        if at_the_end or trainer.global_step - max(self.drawn_at, 0) >= self.every_n_steps:
            self._validate(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step > max(self.drawn_at, 0):
            self._validate(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """After the last checkpoint is saved, and also where a resumed run had nothing left to train."""
        if self.best is not None and self.best_step is not None and self.best_step != trainer.global_step:
            best = read_checkpoint(self.folder / "best.ckpt", "best checkpoint")
            if best["global_step"] != self.best_step:
                raise UserError(
                    f"{self.folder / 'best.ckpt'} is of step {best['global_step']}, and the best was step "
                    f"{self.best_step}: another run has written it"
                )
            check_weights(best["state_dict"].items(), "best.ckpt")
            module.restore(best)
            rank_zero_only(print)(
                f"best {self.best} {self.best_value:.3f} at step {self.best_step}: the run ends with that checkpoint",
                flush=True,
            )

    def _validate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.drawn_at = trainer.global_step
        metrics = self._measure(trainer, module)
        self._log(trainer, metrics)
        self._warn_of_falls(metrics)
        if self.best is None:
            return
        if self.best not in metrics:
            raise UserError(f"callbacks.validation.best={self.best} was not measured; there are {', '.join(metrics)}")
        sign = -1 if self.best in self._less_is_better() else 1
        if self.best_value is None or sign * metrics[self.best] > sign * self.best_value:
            self.best_value, self.best_step = metrics[self.best], trainer.global_step
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)

    def _less_is_better(self) -> set[str]:
        columns = self.benchmark.columns if self.benchmark is not None else ()
        return {"val/fid", *(f"val/{column.name}" for column in columns if not column.more_is_better)}

    def _warn_of_falls(self, metrics: dict[str, float]) -> None:
        prompts = self.benchmark.prompts() if self.benchmark is not None else []
        for name, value in metrics.items():
            before, n = (self.base or {}).get(name), sum(f"val/{prompt.tag}" == name for prompt in prompts)
            if before is None or not n or name in self.warned:
                continue
            error = (2 * max(before * (1 - before), 0.01) / n) ** 0.5
            if value < before - error:
                self.warned.append(name)
                fall = f"{name} fell from {before:.2f} (untouched model) to {value:.2f}, n={n}"
                rank_zero_only(print)(fall, flush=True)

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        module.model.prepare()
        prompts = self.benchmark.prompts() if self.benchmark is not None else trainer.datamodule.validation
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine, mode = prompts[rank::world], "plan" if module.plan else "direct"
        rows: list[Row] = []
        for first in range(0, len(mine), self.batch_size):
            batch = mine[first : first + self.batch_size]
            seeds = [derive_seed("validate", prompt.id) for prompt in batch]
            images = module.model.generate([prompt.text for prompt in batch], seeds, mode=mode, fresh=False).images
            rows += self._judge(batch, seeds, images)
        if world > 1:
            gathered: list = [None] * world
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        return self._summary(rows)

    def _judge(self, prompts: list[Prompt], seeds: list[int], images: np.ndarray) -> list[Row]:
        drawn, count = Drawn(prompts=prompts, seeds=seeds, images=images), len(prompts)
        by_judge = {name: checked(judge(drawn), count, name).total.tolist() for name, judge in self.judges.items()}
        scores = [{name: values[i] for name, values in by_judge.items()} for i in range(count)]
        features = self._features_of(images)
        if self.benchmark is None:
            return [Row(scores[i], features=features[i]) for i in range(count)]
        judged = list(zip(prompts, verdicts_of(self.benchmark, images, prompts), strict=True))
        measured = [measured_of(self.benchmark, prompt, verdict) for prompt, verdict in judged]
        return [
            Row(scores[i], prompt.tag, verdict, measured[i], features[i]) for i, (prompt, verdict) in enumerate(judged)
        ]

    def _features_of(self, images: np.ndarray) -> np.ndarray | list[None]:
        if self.features is None:
            return [None] * len(images)
        features = features_of(self.features, images)
        if features is None:
            raise UserError(f"{type(self.features).__name__} has reference_features(), and must have features(images)")
        return features

    def _summary(self, rows: list[Row]) -> dict[str, float]:
        metrics = {name: float(np.mean([row.scores[name] for row in rows])) for name in self.judges}
        if self.benchmark is not None:
            metrics["score"] = float(np.mean([row.verdict.score for row in rows]))
            for column in self.benchmark.columns:
                values = [row.measured[column.name] for row in rows if column.name in row.measured]
                metrics |= {column.name: float(np.mean(values))} if values else {}
            for tag in dict.fromkeys(row.tag for row in rows):
                metrics[tag] = float(np.mean([row.verdict.strict for row in rows if row.tag == tag]))
            metrics["overall"] = float(np.mean([metrics[tag] for tag in self.benchmark.overall_tasks]))
        if self.features is not None:
            features = np.stack([row.features for row in rows])
            metrics["fid"] = frechet_distance(features, self.features.reference_features())
        return {f"val/{name}": value for name, value in metrics.items()}

    @staticmethod
    def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def state_dict(self) -> dict:
        return {
            "drawn_at": self.drawn_at,
            "best_value": self.best_value,
            "best_step": self.best_step,
            "base": self.base,
            "warned": self.warned,
        }

    def load_state_dict(self, state: dict) -> None:
        self.drawn_at, self.base, self.warned = state["drawn_at"], state["base"], state["warned"]
        self.best_value, self.best_step = state["best_value"], state["best_step"]
        best = self.folder / "best.ckpt"
        saved_step = read_checkpoint(best)["global_step"] if best.is_file() else None
        if saved_step != self.best_step:
            # In another folder, or of steps that come again: the best is chosen from what comes now.
            self.best_value = self.best_step = None
