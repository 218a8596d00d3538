"""Every turn of interleaved drawing as a stage of its own, and what a reflection did: named the defect, mended it, broke what was right."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from t2i_rl.core.contract_checks import checked, features_of
from t2i_rl.core.contracts import Drawn
from t2i_rl.core.hashing import modules_sha256
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.evaluator import Evaluator
from t2i_rl.evaluation.stats import RESAMPLES, bootstrap, percentile_interval
from t2i_rl.methods.irg.rounds import Interleave, says_stop
from t2i_rl.methods.irg.trajectory import Trajectory

COSTS = ("text_tokens", "seconds")


class TurnsEvaluator(Evaluator):
    """Draws every round of every prompt, and judges each round's picture: stages `<side>_turn1`, `<side>_turn2` and so on.

    The stop and the choice change no picture, so they are read off the same draws: `<side>_stopped` takes the picture that a reflection found nothing wrong
    with, `<side>_chosen` the one that `judge` scores highest.
    """

    def __init__(self, interleaved: torch.nn.Module, interleave: Interleave, judge, benchmark, folder: Path, seed: int, batch_size: int):  # fmt: skip
        super().__init__(interleaved.adapter, benchmark, "turns", folder, seed, batch_size)
        self.interleaved, self.judge, self.stop = interleaved, judge, interleave.stop
        self.interleave = interleave.every_round()
        self.side = self.folder.name.split("_")[0]

    def stages(self) -> dict[str, Path]:
        names = [f"turn{turn + 1}" for turn in range(self.interleave.rounds)]
        names += ["stopped"] * (self.stop is not None and self.interleave.rounds > 1) + ["chosen"] * (self.judge is not None)  # fmt: skip
        return {f"{self.side}_{name}": self.folder.with_name(f"{self.side}_{name}") for name in names}

    def on_test_start(self) -> None:
        self.interleaved.prepare()

    def test_step(self, batch: list[tuple[int, Prompt, int]], index: int) -> None:
        prompts = [prompt for _, prompt, _ in batch]
        seeds = [derive_seed(self.seed, "evaluate", prompt.id, sample) for _, prompt, sample in batch]
        drawn = self.interleave.run(self.interleaved, [prompt.text for prompt in prompts], seeds, judging(self.judge, prompts, seeds))  # fmt: skip
        by_turn = [self._turn(turn, batch, seeds, drawn) for turn in range(self.interleave.rounds)]
        for row, (place, _, _) in enumerate(batch):
            answers = {f"{self.side}_turn{turn + 1}": turn for turn in range(self.interleave.rounds)}
            if f"{self.side}_stopped" in self.stages():
                answers[f"{self.side}_stopped"] = stopped_at(drawn[row].texts, self.stop)
            if self.judge is not None:
                answers[f"{self.side}_chosen"] = int(np.argmax(drawn[row].scores))
            for stage, turn in answers.items():
                record, features = by_turn[turn][row]
                self.rows.setdefault(stage, []).append((place, {**record, "turn": turn + 1}, features))

    def _turn(self, turn: int, batch: list, seeds: list[int], drawn: list[Trajectory]) -> list[tuple[dict, np.ndarray]]:
        """Record and features of one turn's pictures."""
        prompts, images = [prompt for _, prompt, _ in batch], np.stack([each.images[turn] for each in drawn])
        records = self.records(batch, seeds, images, [each.texts[turn] for each in drawn], f"../{self.side}_turn{turn + 1}/")  # fmt: skip
        for record, each, said in zip(records, drawn, reflected(self.benchmark, prompts, drawn, turn), strict=True):
            record |= {"plan_length": each.text_tokens[turn], "text_tokens": each.text_tokens[turn], "seconds": each.seconds[turn], **said}  # fmt: skip
            if turn:
                record["says_stop"] = says_stop(each.texts[turn], self.stop)
            if self.judge is not None:
                record["judge_score"] = each.scores[turn]
        return list(zip(records, features_of(self.benchmark, images), strict=True))

    def fingerprint(self) -> dict:
        judge = None if self.judge is None else [type(self.judge).__name__, modules_sha256(self.judge)]
        return {**super().fingerprint(), "interleave": vars(self.interleave), "stop": self.stop, "cues": self.interleaved.cues, "judge": judge}  # fmt: skip


def judging(reward, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Callable | None:
    """A reward that reads pictures as the judge that `Interleave.run` asks, one finite number a picture; None for none."""
    if reward is None:
        return None

    def judge(numbers: Sequence[int], images: np.ndarray) -> list[float]:
        chosen = [prompts[number] for number in numbers]
        drawn = Drawn(prompts=chosen, seeds=[seeds[number] for number in numbers], images=images)
        return checked(reward(drawn), len(drawn), type(reward).__name__).total.tolist()

    return judge


def reflected(benchmark, prompts: list[Prompt], drawn: Sequence[Trajectory], turn: int) -> list[dict]:
    """Of each text of a turn: whether it did not end; of a reflection, where the benchmark can tell, the `faults` of the picture that it is on, and those `named`."""
    found = [{"unfinished": each.unfinished[turn]} for each in drawn]
    if turn and hasattr(benchmark, "faults"):
        before = np.stack([each.images[turn - 1] for each in drawn])
        for row, each, faults in zip(found, drawn, benchmark.faults(before, prompts), strict=True):
            row |= {"faults": faults, "named": benchmark.named(each.texts[turn])}
    return found


def stopped_at(texts: Sequence[str], stop: str) -> int:
    """The number of the picture that stands: the first one of which the reflection says `stop`, else the last."""
    return next((turn for turn, text in enumerate(texts[1:]) if says_stop(text, stop)), len(texts) - 1)


def reflection_metrics(before: Sequence[dict], after: Sequence[dict], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict]:  # fmt: skip
    """What the reflections between two turns did, as metrics `{name: {mean, low, high, n_prompts, n_images}}` with intervals over prompts.

    `mends`: of the wrong pictures, the share that the next turn has right. `breaks`: of the right ones, the share that it has wrong. `names_defect`: of the
    wrong ones, the share whose reflection names a true fault; `flags`: any fault. `false_alarms`: of the right ones, the share whose reflection names any. `unfinished`: texts.
    """
    first = {(row["prompt_id"], row["sample_index"]): row for row in before}
    pairs = [(first[row["prompt_id"], row["sample_index"]], row) for row in after]
    wrong, right = ([pair for pair in pairs if pair[0]["strict"] == verdict] for verdict in (False, True))
    measured = {
        "mends": [(b, b["strict"]) for _, b in wrong],
        "breaks": [(b, not b["strict"]) for _, b in right],
        "names_defect": [(b, bool(set(b["named"]) & set(b["faults"]))) for _, b in wrong if "named" in b],
        "flags": [(b, bool(b["named"])) for _, b in wrong if "named" in b],
        "false_alarms": [(b, bool(b["named"])) for _, b in right if "named" in b],
        "unfinished": [(b, b["unfinished"]) for _, b in pairs],
    }
    return {name: over_prompts(rows, resamples, seed) for name, rows in measured.items() if rows}


def over_prompts(rows: Sequence[tuple[dict, float]], resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """Mean over images of a value each, with a bootstrap interval over prompts, all in one stratum."""
    prompts, values = np.array([record["prompt_id"] for record, _ in rows]), np.array([float(value) for _, value in rows])  # fmt: skip
    means, draws = bootstrap(values[None], prompts, np.zeros(len(rows)), resamples, np.random.default_rng(seed))
    return {"mean": float(means[0]), **percentile_interval(draws[0]), "n_prompts": len(set(prompts)), "n_images": len(rows)}  # fmt: skip


def turn_metrics(records: Sequence[dict], before: Sequence[dict] | None) -> dict[str, dict]:
    """What only turns have: cost, texts that did not end, and, after the first, what the reflection did."""
    found = {name: over_prompts([(row, row[name]) for row in records]) for name in COSTS}
    if before is None:
        return found | {"unfinished": over_prompts([(row, row["unfinished"]) for row in records])}
    return found | reflection_metrics(before, records)
