"""Evaluation as a LightningModule: `trainer.test(Evaluator(...))` draws, judges and writes one stage's records."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader

from t2i_rl.evaluation.results import read_records, write_records
from t2i_rl.hashing import weights_sha256
from t2i_rl.prompts import Prompt
from t2i_rl.seeding import derive_seed


class Evaluator(L.LightningModule):
    """Draws every prompt of a benchmark `samples_per_prompt` times and has its judge read the images.

    The seed of an image is a function of (seed, prompt id, sample), so stages are paired image by image and batch size or rank count
    change nothing. Records, images and features go to `folder`; a stage that is already there under the same fingerprint is not redrawn.
    """

    def __init__(self, model: torch.nn.Module, benchmark, mode: str, folder: Path, seed: int, batch_size: int = 64):
        super().__init__()
        self.model, self.benchmark, self.mode, self.folder, self.seed = model, benchmark, mode, Path(folder), seed
        self.batch_size = batch_size
        self.rows: list[tuple[int, dict, np.ndarray]] = []

    def test_dataloader(self) -> DataLoader:
        """This rank's share of all (place, prompt, sample) triples: every world_size-th, none twice."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        samples = range(self.benchmark.samples_per_prompt)
        work = [(prompt, sample) for prompt in self.benchmark.prompts() for sample in samples]
        mine = [(place, *item) for place, item in enumerate(work)][rank::world_size]
        return DataLoader(mine, batch_size=self.batch_size, collate_fn=list)

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Prompts are text: there is nothing to move."""
        return batch

    def configure_model(self) -> None:
        """Nothing: weights stay as they are, whole or sharded."""

    def on_test_start(self) -> None:
        self.model.prepare()

    def test_step(self, batch: list[tuple[int, Prompt, int]], index: int) -> None:
        prompts = [prompt for _, prompt, _ in batch]
        seeds = [derive_seed(self.seed, "evaluate", prompt.id, sample) for _, prompt, sample in batch]
        drawn = self.model.generate([prompt.text for prompt in prompts], seeds, mode=self.mode, fresh=False)
        verdicts = self.benchmark.judge(drawn.images, prompts)
        features = self.benchmark.features(drawn.images)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        for row, (place, prompt, sample) in enumerate(batch):
            name = f"images/{place:05d}.png"
            Image.fromarray(drawn.images[row]).save(self.folder / name)
            record = {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "tag": prompt.tag,
                "seen": prompt.meta.get("seen"),
                "sample_index": sample,
                "seed": seeds[row],
                "plan": drawn.plans[row],
                "plan_length": drawn.plan_lengths[row] if self.mode == "plan" else None,
                "strict": verdicts[row].strict,
                "lenient": verdicts[row].lenient,
                "score": verdicts[row].score,
                "defects": verdicts[row].defects,
                "image": name,
            }
            self.rows.append((place, record, features[row]))

    def on_test_epoch_end(self) -> None:
        rows = self.rows
        if dist.is_initialized():
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        rows.sort(key=lambda row: row[0])
        fingerprint = self.fingerprint()
        if self.trainer.is_global_zero:
            np.save(self.folder / "features.npy", np.stack([features for _, _, features in rows]).astype(np.float32))
            (self.folder / "fingerprint.json").write_text(json.dumps(fingerprint, indent=1))
            write_records(self.folder / "records.jsonl", [record for _, record, _ in rows])
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


def evaluate(trainer: L.Trainer, evaluator: Evaluator) -> list[dict]:
    """Records of one stage: drawn and judged now, or read back where the same fingerprint already stands on disk."""
    saved = evaluator.folder / "fingerprint.json"
    records = evaluator.folder / "records.jsonl"
    if not (records.exists() and saved.exists() and json.loads(saved.read_text()) == evaluator.fingerprint()):
        trainer.test(evaluator, verbose=False)
    return read_records(records)
