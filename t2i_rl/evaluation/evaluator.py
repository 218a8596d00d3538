"""Evaluation as a LightningModule: `trainer.test(Evaluator(...))` draws, judges and writes one stage's records."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from t2i_rl.core import stopping
from t2i_rl.core.contract_checks import features_of, verdicts_of
from t2i_rl.core.files import read_json, replacing, write_atomic
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.pixels import write_png
from t2i_rl.core.prompts import Prompt, with_distinct_ids
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.records import read_records, write_records


class Evaluator(L.LightningModule):
    """Draws every prompt of a benchmark `samples_per_prompt` times and has its judge read the images.

    The seed of an image is a function of (seed, prompt id, sample), so stages are paired image by image and batch size or rank count
    change nothing. Records, images and features go to `folder`; a stage that is already there under the same fingerprint is not redrawn.
    """

    def __init__(self, model: torch.nn.Module, benchmark, mode: str, folder: Path, seed: int, batch_size: int = 64):
        super().__init__()
        self.model, self.benchmark, self.mode, self.folder, self.seed = model, benchmark, mode, Path(folder), seed
        self.batch_size = batch_size
        self.rows: dict[str, list[tuple[int, dict, np.ndarray]]] = {}

    def stages(self) -> dict[str, Path]:
        """Where the records of each stage go that one pass draws."""
        return {self.folder.name: self.folder}

    def test_dataloader(self) -> DataLoader:
        """This rank's share of all (place, prompt, sample) triples: every world_size-th, none twice."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        samples = range(self.benchmark.samples_per_prompt)
        prompts = [
            (f"prompt {place} of the benchmark", prompt) for place, prompt in enumerate(self.benchmark.prompts())
        ]
        work = [(prompt, sample) for prompt in with_distinct_ids(prompts) for sample in samples]
        mine = [(place, *item) for place, item in enumerate(work)][rank::world_size]
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
        features = features_of(self.benchmark, drawn.images)
        for row, (place, _, _) in enumerate(batch):
            records[row]["plan_length"] = drawn.plan_lengths[row] if self.mode == "plan" else None
            self.rows.setdefault(self.folder.name, []).append((place, records[row], features[row]))

    def records(self, batch: list[tuple[int, Prompt, int]], seeds: list[int], images: np.ndarray, texts: list[str], where: str = "") -> list[dict]:  # fmt: skip
        """Judge pictures and save them below `where`, seen from the stage's folder; a record each."""
        verdicts = verdicts_of(self.benchmark, images, [prompt for _, prompt, _ in batch])
        found = []
        for row, (place, prompt, sample) in enumerate(batch):
            name = f"{where}images/{place:05d}.png"
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_png(self.folder / name, images[row])
            found.append(
                {
                    "prompt_id": prompt.id,
                    "prompt": prompt.text,
                    "tag": prompt.tag,
                    "seen": prompt.meta.get("seen"),
                    "sample_index": sample,
                    "seed": seeds[row],
                    "plan": texts[row],
                    "strict": verdicts[row].strict,
                    "lenient": verdicts[row].lenient,
                    "score": verdicts[row].score,
                    "defects": [defect.text for defect in verdicts[row].defects],
                    "image": name,
                }
            )
        return found

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
            write_array(folder / "features.npy", np.stack([features for _, _, features in ordered]).astype(np.float32))
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


def evaluate(trainer: L.Trainer, evaluator: Evaluator) -> dict[str, list[dict]]:
    """Records of every stage that the evaluator draws: drawn and judged now, or read back where the same fingerprint already stands on disk."""
    fingerprint, places = evaluator.fingerprint(), evaluator.stages()
    saved = [folder / "fingerprint.json" for folder in places.values()]
    if not all(file.exists() and read_json(file) == fingerprint for file in saved):
        trainer.test(evaluator, verbose=False)
    return {stage: read_records(folder / "records.jsonl") for stage, folder in places.items()}


def write_array(path: Path, array: np.ndarray) -> None:
    """Write NumPy's own format, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)
