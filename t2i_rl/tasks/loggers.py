"""Loggers that survive a resume: metrics.csv keeps its rows, W&B keeps its run."""

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from t2i_rl.core.files import replacing, write_atomic


@rank_zero_only
def tell_wandb(loggers: list[Logger], settings: dict) -> None:
    """Give W&B's runs the whole config, and the step that their curves are drawn over."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(settings, allow_val_change=True)
            logger.experiment.define_metric("*", step_metric="trainer/global_step")


@rank_zero_only
def log_results(loggers: list[Logger], results: dict) -> None:
    """Put every figure of results.json into the W&B run's summary: `eval/<stage>/<metric>/mean|low|high`.

    A dashboard compares runs by their summaries.
    """
    figures = {stage: content["metrics"] for stage, content in results["stages"].items()}
    figures |= {f"{item['b']}-{item['a']}": item["metrics"] for item in results["comparisons"]}
    summary = {
        f"eval/{of}/{name}/{key}": cell[key]
        for of, metrics in figures.items()
        for name, cell in metrics.items()
        for key in ("mean", "difference", "low", "high")
        if cell.get(key) is not None
    }
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(summary)


def csv_logger(folder: str, ckpt_path: str | None) -> CSVLogger:
    """metrics.csv in `folder`.

    Upon a resume the rows up to the checkpoint stay; later ones, from before the kill, are logged anew. A step's own
    row has the number of batches before it; what is validated after a step has the number of steps up to it, and is
    there before that checkpoint.
    """
    earlier = _rows_before(Path(folder) / "metrics.csv", ckpt_path) if ckpt_path else []
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    if earlier and rank_zero_only.rank == 0:
        logger.experiment.metrics.extend(earlier)
        logger.experiment.save()
    return logger


def _rows_before(path: Path, ckpt_path: str) -> list[dict]:
    if not path.is_file():
        return []
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True, mmap=True)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    with path.open(newline="") as rows:
        return [
            row
            for row in csv.DictReader(rows)
            if int(row["step"]) < (checkpoint["global_step"] + 1 if _validated(row) else batches)
        ]


def _validated(row: dict) -> bool:
    return any(value and name.startswith("val") for name, value in row.items())


class WandbParts(WandbLogger):
    """A W&B run that counts its rows in a file, so that a later part of it goes on where this one stopped.

    W&B does so by itself only online: offline it asks no server how far the run had come.
    """

    def __init__(self, rows: Path, **settings):
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)  # Lightning names it always, and W&B warns of it
        self.rows = rows

    def go_on(self) -> None:
        """Begin at the row where the part before stopped."""
        if self.rows.is_file():
            self.experiment.log({}, step=int(self.rows.read_text()))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        with replacing(self.rows, durable=False) as temporary:  # a power cut costs a row number, not the run
            temporary.write_text(str(self.experiment.step))


def wandb_logger(folder: str, ckpt_path: str | None, **settings) -> WandbLogger:
    """A W&B run whose id is kept in `folder`, and taken up again when a checkpoint is resumed.

    Offline each start writes a part of its own, under the same id; a line says how to upload them as one run.
    """
    place = Path(folder) / "wandb_run_id.txt"
    resumed = {"id": place.read_text().strip(), "resume": "must"} if ckpt_path and place.is_file() else {}
    logger = WandbParts(Path(folder) / "wandb_rows.txt", save_dir=folder, **settings, **resumed)
    if rank_zero_only.rank == 0:
        run = logger.experiment
        if resumed and run.offline:
            logger.go_on()
            parts = Path(run.dir).parents[1] / f"offline-run-*-{run.id}"
            part = f"W&B is offline, so this is another part of run {run.id}"
            print(f"{part}: upload all parts as one run with wandb sync {parts}", flush=True)
        write_atomic(place, str(run.id))
    return logger
