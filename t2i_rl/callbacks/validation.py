"""Draw held-back prompts while training, judge them, and keep the checkpoint that judged best on them (never on the test split)."""

from contextlib import nullcontext
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

from t2i_rl.core.checkpoints import read_checkpoint
from t2i_rl.core.contract_checks import checked, features_of, verdicts_of
from t2i_rl.core.contracts import Drawn
from t2i_rl.core.errors import UserError
from t2i_rl.core.finite import check_weights
from t2i_rl.core.numbers import Count
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.fid import frechet_distance


class Validate(L.Callback):
    """Before the first step (without what learns, where it can be switched off), every `every_n_steps`, and at the end.

    Args:
        benchmark: its prompts are drawn once each, with the same seeds every time, and judged: `val/overall`, `val/<task>`, and for counting
            how often too many and too few objects were drawn; None takes the data module's `validation` prompts and only the judges.
        judges: rewards that read pictures, by name: `val/<name>`.
        fid: true logs the Frechet distance of the benchmark's features to those of its own renders (`val/fid`); an object with `features`
            and `reference_features`, such as `InceptionFeatures`, takes the place of the benchmark's.
        best: the logged metric by which `checkpoints/best.ckpt` is chosen, larger is better; it is what the run ends with. None keeps the last.
        batch_size: images drawn together.

    A task whose accuracy falls below the untouched model's by more than its standard error is said once: counting is where these methods pay.
    """

    def __init__(
        self,
        folder: str,
        benchmark: object | None = None,
        judges: dict[str, object | None] | None = None,
        every_n_steps: Count = 50,
        fid: bool | object | None = True,
        best: str | None = "val/overall",
        batch_size: Count = 64,
    ):
        self.folder, self.benchmark, self.judges = Path(folder), benchmark, judges or {}
        self.every_n_steps, self.best, self.batch_size = every_n_steps, best, batch_size
        self.features = benchmark if fid is True else fid or None
        self.drawn_at, self.best_value, self.best_step, self.base = -1, None, None, None
        self.warned: list[str] = []

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
        found = self._measure(trainer, module)
        self._log(trainer, found)
        self._gate(found)
        if self.best is None:
            return
        if self.best not in found:
            raise UserError(f"callbacks.validation.best={self.best} was not measured; there are {', '.join(found)}")
        if self.best_value is None or found[self.best] > self.best_value:
            self.best_value, self.best_step = found[self.best], trainer.global_step
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)

    def _gate(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            before = (self.base or {}).get(name)
            prompts = self.benchmark.prompts() if self.benchmark is not None else []
            n = sum(prompt.tag == name.removeprefix("val/") for prompt in prompts)
            if before is None or not n:
                continue
            error = (2 * max(before * (1 - before), 0.01) / n) ** 0.5
            if value < before - error and name not in self.warned:
                self.warned.append(name)
                rank_zero_only(print)(
                    f"{name} fell from {before:.2f} (untouched model) to {value:.2f}, n={n}", flush=True
                )

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        module.model.prepare()
        prompts = self.benchmark.prompts() if self.benchmark is not None else trainer.datamodule.validation
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine, mode = list(range(len(prompts)))[rank::world], "plan" if module.plan else "direct"
        rows: list[tuple[int, dict, np.ndarray | None]] = []
        for first in range(0, len(mine), self.batch_size):
            places = mine[first : first + self.batch_size]
            chosen = [prompts[place] for place in places]
            seeds = [derive_seed("validate", prompt.id) for prompt in chosen]
            images = module.model.generate([prompt.text for prompt in chosen], seeds, mode=mode, fresh=False).images
            rows += self._judge(places, chosen, seeds, images)
        if world > 1:
            gathered: list = [None] * world
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        return self._summary([row for _, row, _ in rows], [features for _, _, features in rows])

    def check_best(self, where: str) -> None:
        """Whether `best` will be measured.

        Raises:
            UserError: it will not; the line names what will.
        """
        tags = {prompt.tag for prompt in self.benchmark.prompts()} if self.benchmark is not None else set()
        names = [
            *self.judges,
            *(["overall", "score", *sorted(tags)] if tags else ()),
            *(["fid"] if self.features else ()),
        ]
        names += ["over_counted", "under_counted"] if "counting" in tags else ()
        if self.best is not None and self.best not in (measured := [f"val/{name}" for name in names]):
            raise UserError(f"{where}.best={self.best} is not measured; choose from {', '.join(measured)}, or null")

    def _judge(self, places: list[int], prompts: list[Prompt], seeds: list[int], images: np.ndarray) -> list[tuple]:
        drawn = Drawn(prompts=prompts, seeds=seeds, images=images)
        scores = {name: checked(judge(drawn), len(drawn), name).total for name, judge in self.judges.items()}
        rows = [{name: float(values[i]) for name, values in scores.items()} for i in range(len(prompts))]
        features = features_of(self.features, images) if self.features else [None] * len(prompts)
        if self.benchmark is None:
            return list(zip(places, rows, features, strict=True))
        for row, prompt, verdict in zip(rows, prompts, verdicts_of(self.benchmark, images, prompts), strict=True):
            row |= {"overall": float(verdict.strict), "score": verdict.score, "tag": prompt.tag}
            if prompt.tag == "counting":
                row["over_counted"] = float(any(defect.kind == "extra" for defect in verdict.defects))
                row["under_counted"] = float(any(defect.kind == "missing" for defect in verdict.defects))
        return list(zip(places, rows, features, strict=True))

    def _summary(self, rows: list[dict], features: list) -> dict[str, float]:
        names = dict.fromkeys(name for row in rows for name in row if name not in ("tag", "overall"))
        found = {f"val/{name}": float(np.mean([row[name] for row in rows if name in row])) for name in names}
        if self.features:
            found["val/fid"] = frechet_distance(np.stack(features), self.features.reference_features())
        if self.benchmark is None:
            return found
        tasks = {
            tag: [row["overall"] for row in rows if row["tag"] == tag]
            for tag in dict.fromkeys(row["tag"] for row in rows)
        }
        means = {tag: float(np.mean(values)) for tag, values in tasks.items()}
        found |= {f"val/{tag}": value for tag, value in means.items()}
        found["val/overall"] = float(np.mean([means[tag] for tag in self.benchmark.overall_tasks]))
        return found

    @staticmethod
    def _log(trainer: L.Trainer, found: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("drawn_at", "best_value", "best_step", "base", "warned")}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        best = self.folder / "best.ckpt"
        saved_step = read_checkpoint(best)["global_step"] if best.is_file() else None
        if (
            saved_step != self.best_step
        ):  # in another folder, or of steps that come again: the best is chosen from what comes now
            self.best_value = self.best_step = None
