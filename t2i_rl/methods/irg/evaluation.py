"""Every turn of interleaved drawing as a stage of its own, and what a reflection did.

It may name the defect, mend it, or break what was right.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from t2i_rl.core.contract_checks import checked
from t2i_rl.core.contracts import Benchmark, Column, Drawn, Reward
from t2i_rl.core.hashing import modules_sha256
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed
from t2i_rl.evaluation.drawer import Drawer, Pair
from t2i_rl.evaluation.evaluator import Evaluator
from t2i_rl.evaluation.stage import SIDES, Stage
from t2i_rl.evaluation.stats import RESAMPLES, bootstrap, percentile_interval
from t2i_rl.evaluation.tables import Selection
from t2i_rl.methods.irg.rounds import Rounds, says_stop
from t2i_rl.methods.irg.tables import COSTS, columns_of_turn, turn_tables
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.models.autoregressive.interleaved import InterleavedJanus


class TurnsDrawer(Drawer):
    """Stages `base_turns` and `trained_turns` come out as a stage a turn, and as what the stop and the choice take."""

    compared = (
        *Drawer.compared,
        *(("base_direct", f"{side}_turn1") for side in SIDES),
        ("base_plan", "trained_turn1"),
        ("base_plan", "trained_turn2"),
        *((f"{side}_turn1", f"{side}_{answer}") for side in SIDES for answer in ("stopped", "chosen")),
        ("base_plan", "trained_stopped"),
        *((f"base_{turn}", f"trained_{turn}") for turn in ("turn1", "turn2", "stopped")),
    )
    headlines = (
        ("base_plan", "trained_turn2"),
        ("base_plan", "trained_turn1"),
        ("base_turn2", "trained_turn2"),
        *Drawer.headlines,
    )

    @classmethod
    def gives(cls, stage: Stage) -> list[Stage]:
        return [stage.of("turn1"), stage.of("turn2")] if stage.way == "turns" else [stage]

    @classmethod
    def columns(cls, stage: Stage) -> Sequence[Column]:
        return () if stage.turn is None else columns_of_turn(stage.turn)

    def evaluator(self, stage: Stage, benchmark: Benchmark, folder: Path, seed: int, batch_size: int) -> Evaluator:
        if stage.way != "turns":
            return super().evaluator(stage, benchmark, folder, seed, batch_size)
        method = self.method
        return TurnsEvaluator(method.interleaved, method.interleave, method.judge, benchmark, folder, seed, batch_size)

    def metrics(self, stage: Stage, records: Mapping[str, Sequence[dict]]) -> dict[str, dict]:
        """What a turn has beside its pictures, the reflection between it and the turn before among it."""
        if stage.turn is None:
            return {}
        return turn_metrics(records[stage.name], records.get(stage.of(f"turn{stage.turn - 1}").name))

    def pairs(self, stages: Sequence[Stage]) -> list[Pair]:
        turns = [stage for stage in stages if stage.turn is not None]
        return [*super().pairs(stages), *((a.name, b.name) for a, b in pairwise(turns) if a.side == b.side)]

    def tables(self, stages: Sequence[Stage], pairs: Sequence[Pair]) -> list[Selection]:
        return turn_tables(stages, pairs)


class TurnsEvaluator(Evaluator):
    """Draws every round of every prompt, and judges each round's picture: stages `<side>_turn1`, `<side>_turn2` and so
    on.

    The stop and the choice change no picture, so they are read off the same draws: `<side>_stopped` takes the picture
    that a reflection found nothing wrong with, `<side>_chosen` the one that `judge` scores highest.
    """

    def __init__(
        self,
        interleaved: InterleavedJanus,
        interleave: Rounds,
        judge: Reward | None,
        benchmark: Benchmark,
        folder: Path,
        seed: int,
        batch_size: int,
    ):
        super().__init__(interleaved.adapter, benchmark, "turns", folder, seed, batch_size)
        self.interleaved, self.judge, self.stop = interleaved, judge, interleave.stop
        self.interleave = interleave.every_round()
        self.stage = Stage.parse(self.folder.name)

    def stages(self) -> dict[str, Path]:
        pictures = [f"turn{turn + 1}" for turn in range(self.interleave.rounds)]
        pictures += ["stopped"] * self._stops() + ["chosen"] * (self.judge is not None)
        return {self._name(picture): self.folder.with_name(self._name(picture)) for picture in pictures}

    def _name(self, picture: str) -> str:
        return self.stage.of(picture).name

    def _stops(self) -> bool:
        """Whether a reflection may find that an earlier picture stands."""
        return self.stop is not None and self.interleave.rounds > 1

    def on_test_start(self) -> None:
        self.interleaved.prepare()

    def test_step(self, batch: list[tuple[int, Prompt, int]], index: int) -> None:
        prompts = [prompt for _, prompt, _ in batch]
        seeds = [derive_seed(self.seed, "evaluate", prompt.id, sample) for _, prompt, sample in batch]
        texts, judge = [prompt.text for prompt in prompts], judging(self.judge, prompts, seeds)
        drawn = self.interleave.run(self.interleaved, texts, seeds, judge)
        by_turn = [self._turn(turn, batch, seeds, drawn) for turn in range(self.interleave.rounds)]
        for row, (number, _, _) in enumerate(batch):
            answers = {f"turn{turn + 1}": turn for turn in range(self.interleave.rounds)}
            if self.stop is not None and self._stops():
                answers["stopped"] = stopped_at(drawn[row].texts, self.stop)
            if self.judge is not None:
                answers["chosen"] = int(np.argmax(drawn[row].scores))
            for picture, turn in answers.items():
                record, features = by_turn[turn][row]
                rows = self.rows.setdefault(self._name(picture), [])
                rows.append((number, {**record, "turn": turn + 1}, features))

    def _turn(
        self, turn: int, batch: list, seeds: list[int], drawn: list[Trajectory]
    ) -> list[tuple[dict, np.ndarray | None]]:
        """Record and features of one turn's pictures."""
        prompts, images = [prompt for _, prompt, _ in batch], np.stack([row.images[turn] for row in drawn])
        where = f"../{self._name(f'turn{turn + 1}')}/"
        records = self.records(batch, seeds, images, [row.texts[turn] for row in drawn], where)
        for record, row, said in zip(records, drawn, reflected(self.benchmark, prompts, drawn, turn), strict=True):
            tokens = row.text_tokens[turn]
            record |= {"plan_length": tokens, "text_tokens": tokens, "seconds": row.seconds[turn], **said}
            if turn:
                record |= {"says_stop": says_stop(row.texts[turn], self.stop), "text_is": "reflection"}
            if self.judge is not None:
                record["judge_score"] = row.scores[turn]
        return list(zip(records, self.features(images), strict=True))

    def fingerprint(self) -> dict:
        judge = None if self.judge is None else [type(self.judge).__name__, modules_sha256(self.judge)]
        rounds = {"interleave": vars(self.interleave), "stop": self.stop, "cues": self.interleaved.cues}
        return {**super().fingerprint(), **rounds, "judge": judge}


def judging(reward: Reward | None, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Callable | None:
    """A reward that reads pictures as the judge that `Rounds.run` asks, one finite number a picture; None for
    none."""
    if reward is None:
        return None

    def judge(numbers: Sequence[int], images: np.ndarray) -> list[float]:
        chosen = [prompts[number] for number in numbers]
        drawn = Drawn(prompts=chosen, seeds=[seeds[number] for number in numbers], images=images)
        return checked(reward(drawn), len(drawn), type(reward).__name__).total.tolist()

    return judge


def reflected(benchmark: Benchmark, prompts: list[Prompt], drawn: Sequence[Trajectory], turn: int) -> list[dict]:
    """Of each text of a turn: whether it did not end; of a reflection, where the benchmark has words for it, the
    `faults` of the picture that it is on, and those `named`."""
    rows: list[dict] = [{"unfinished": row.unfinished[turn]} for row in drawn]
    faults = benchmark.faults(np.stack([row.images[turn - 1] for row in drawn]), prompts) if turn else None
    if faults is not None:
        for said, row, faults_of_picture in zip(rows, drawn, faults, strict=True):
            said |= {"faults": faults_of_picture, "named": benchmark.named(row.texts[turn])}
    return rows


def stopped_at(texts: Sequence[str], stop: str) -> int:
    """The number of the picture that stands: the first one of which the reflection says `stop`, else the last."""
    return next((turn for turn, text in enumerate(texts[1:]) if says_stop(text, stop)), len(texts) - 1)


def reflection_metrics(
    before: Sequence[dict], after: Sequence[dict], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict]:
    """What the reflections between two turns did, as metrics `{name: {mean, low, high, n_prompts, n_images}}` with
    intervals over prompts.

    `mends`: of the wrong pictures, the share that the next turn has right. `breaks`: of the right ones, the share that
    it has wrong. `names_defect`: of the wrong ones, the share whose reflection names a true fault; `flags`: any fault.
    `false_alarms`: of the right ones, the share whose reflection names any. `unfinished`: texts.
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
    prompts = np.array([record["prompt_id"] for record, _ in rows])
    values = np.array([[float(value) for _, value in rows]])
    means, draws = bootstrap(values, prompts, np.zeros(len(rows)), resamples, np.random.default_rng(seed))
    counts = {"n_prompts": len(set(prompts)), "n_images": len(rows)}
    return {"mean": float(means[0]), **percentile_interval(draws[0]), **counts}


def turn_metrics(records: Sequence[dict], before: Sequence[dict] | None) -> dict[str, dict]:
    """What only turns have: cost, texts that did not end, and, after the first, what the reflection did."""
    costs = {cost.name: over_prompts([(row, row[cost.name]) for row in records]) for cost in COSTS}
    if before is None:
        return costs | {"unfinished": over_prompts([(row, row["unfinished"]) for row in records])}
    return costs | reflection_metrics(before, records)
