"""Evaluation as a LightningModule: `trainer.test(Evaluator(...))` draws, judges and writes one stage's records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from t2i_rl.core import stopping
from t2i_rl.core.contract_checks import features_of, measured_of, verdicts_of
from t2i_rl.core.contracts import Benchmark, ImageModel, Verdict
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json, replacing, write_atomic
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.pixels import write_png
from t2i_rl.core.prompts import Prompt, with_distinct_ids
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.records import read_records, write_records

FEATURES = "features.npy"
# What a record says of a picture that no benchmark has judged.
UNJUDGED: dict[str, Any] = {
    **{"strict": None, "lenient": None, "score": None},
    **{"measured": {}, "defects": [], "defect_kinds": []},
}


class Evaluator(L.LightningModule):
    """Draws every prompt of a benchmark `samples_per_prompt` times and has its judge read the images.

    The seed of an image is a function of (seed, prompt id, sample), so stages are paired image by image and batch size
    or rank count change nothing. Records, images and features (where the benchmark has some) go to `folder`, which has
    the stage's name; a stage that is already there under the same fingerprint is not redrawn.
    """

    def __init__(
        self, model: ImageModel, benchmark: Benchmark, mode: str, folder: Path, seed: int, batch_size: int = 64
    ):
        super().__init__()
        self.model, self.benchmark, self.mode, self.folder, self.seed = model, benchmark, mode, Path(folder), seed
        self.batch_size = batch_size
        self.rows: dict[str, list[tuple[int, dict, np.ndarray | None]]] = {}  # by stage: number, record, features

    def stages(self) -> dict[str, Path]:
        """Where the records of each stage go that one pass draws."""
        return {self.folder.name: self.folder}

    def test_dataloader(self) -> DataLoader:
        """This rank's share of all (number, prompt, sample) triples: every world_size-th, none twice."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        samples = range(self.benchmark.samples_per_prompt)
        placed = [(f"prompt {place} of the benchmark", prompt) for place, prompt in enumerate(self.benchmark.prompts())]
        work = [(prompt, sample) for prompt in with_distinct_ids(placed) for sample in samples]
        mine: Any = [(number, *item) for number, item in enumerate(work)][rank::world_size]  # a list is a dataset
        return DataLoader(mine, batch_size=self.batch_size, collate_fn=list)

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Prompts are text: there is nothing to move."""
        return batch

    def configure_model(self) -> None:
        """Nothing: weights stay as they are, whole or sharded."""

    def on_test_start(self) -> None:
        stopping.listen()
        self.model.prepare()

    def test_step(self, batch: list[tuple[int, Prompt, int]], index: int) -> None:
        prompts = [prompt for _, prompt, _ in batch]
        seeds = [derive_seed(self.seed, "evaluate", prompt.id, sample) for _, prompt, sample in batch]
        drawn = self.model.generate([prompt.text for prompt in prompts], seeds, mode=self.mode, fresh=False)
        records = self.records(batch, seeds, drawn.images, drawn.plans)
        features = self.features(drawn.images)
        for row, (number, _, _) in enumerate(batch):
            records[row]["plan_length"] = drawn.plan_lengths[row] if self.mode == "plan" else None
            self.rows.setdefault(self.folder.name, []).append((number, records[row], features[row]))

    def features(self, images: np.ndarray) -> np.ndarray | list[None]:
        """Of each image what diversity is measured on; None where the benchmark measures none."""
        features = features_of(self.benchmark, images)
        return [None] * len(images) if features is None else features

    def records(
        self,
        batch: list[tuple[int, Prompt, int]],
        seeds: list[int],
        images: np.ndarray,
        texts: list[str],
        where: str = "",
    ) -> list[dict]:
        """Judge pictures and save them below `where`, seen from the stage's folder; a record each."""
        verdicts = verdicts_of(self.benchmark, images, [prompt for _, prompt, _ in batch])
        records = []
        for row, (number, prompt, sample) in enumerate(batch):
            name, verdict = f"{where}images/{number:05d}.png", verdicts[row]
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_png(self.folder / name, images[row])
            records.append(
                {
                    "prompt_id": prompt.id,
                    "prompt": prompt.text,
                    "tag": prompt.tag,
                    "seen": prompt.meta.get("seen"),
                    "sample_index": sample,
                    "seed": seeds[row],
                    "plan": texts[row],
                    **judged(self.benchmark, prompt, verdict),
                    "image": name,
                }
            )
        return records

    def on_test_epoch_end(self) -> None:
        rows = self.rows
        if dist.is_initialized():
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows)
            rows = {stage: [row for part in gathered for row in part.get(stage, [])] for stage in self.stages()}
        fingerprint = self.fingerprint()
        for stage, folder in self.stages().items() if self.trainer.is_global_zero else ():
            ordered = sorted(rows[stage], key=lambda row: row[0])
            folder.mkdir(parents=True, exist_ok=True)
            write_features(folder / FEATURES, [features for _, _, features in ordered])
            write_records(folder / "records.jsonl", [record for _, record, _ in ordered])
            write_atomic(folder / "fingerprint.json", json.dumps(fingerprint, indent=1))
        self.trainer.strategy.barrier()

    def fingerprint(self) -> dict:
        """What these records depend on: benchmark, mode, seed, sampler settings, and the weights themselves."""
        return {
            **self.benchmark.fingerprint(),
            "mode": self.mode,
            "seed": self.seed,
            "sampling": self.model.sampling(),
            "weights_sha256": weights_sha256(self.model),
        }


def judged(benchmark: Benchmark, prompt: Prompt, verdict: Verdict) -> dict:
    """What a record says of a verdict; `UNJUDGED` where there is none."""
    return {
        "strict": verdict.strict,
        "lenient": verdict.lenient,
        "score": verdict.score,
        "measured": measured_of(benchmark, prompt, verdict),
        "defects": [defect.text for defect in verdict.defects],
        "defect_kinds": [defect.kind for defect in verdict.defects],
    }


def evaluate(trainer: L.Trainer, evaluator: Evaluator) -> dict[str, list[dict]]:
    """Records of every stage that the evaluator draws: drawn and judged now, or read back where the same fingerprint
    already stands on disk."""
    fingerprint, folders = evaluator.fingerprint(), evaluator.stages()
    saved = [folder / "fingerprint.json" for folder in folders.values()]
    if not all(file.exists() and read_json(file) == fingerprint for file in saved):
        trainer.test(evaluator, verbose=False)
    return {stage: read_records(folder / "records.jsonl") for stage, folder in folders.items()}


def write_features(path: Path, features: Sequence[np.ndarray | None]) -> None:
    """Write the features of a stage's images, in order, as NumPy's own format; with none, leave no file of them.

    Raises:
        UserError: some images have features and others have none.
    """
    rows = [row for row in features if row is not None]
    if not rows:
        path.unlink(missing_ok=True)
        return
    if len(rows) < len(features):
        raise UserError("the benchmark's features() gave None for some images, and must for all or for none")
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack(rows).astype(np.float32))


def read_features(folder: Path) -> np.ndarray | None:
    """Features `(N, D)` of a stage's images in the order of its records; None where it has none."""
    path = folder / FEATURES
    return np.load(path) if path.exists() else None
