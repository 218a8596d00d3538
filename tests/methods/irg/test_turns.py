"""Every turn as a stage.

What a reflection did is counted as defined, answers are read off the same draws, and trajectories
survive the disk.
"""

import lightning as L
import numpy as np
import pytest
import torch

from t2i_rl.benchmarks.shapes import Shapes
from t2i_rl.core.contracts import Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.evaluation.evaluator import evaluate
from t2i_rl.evaluation.stage import Stage
from t2i_rl.evaluation.stages import Stages
from t2i_rl.evaluation.tables import Selection, selected_table
from t2i_rl.methods.irg.evaluation import TurnsDrawer, TurnsEvaluator, reflection_metrics, stopped_at
from t2i_rl.methods.irg.files import load_trajectory, save_trajectory
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.irg.strips import strips
from t2i_rl.methods.irg.tables import turn_tables
from t2i_rl.methods.irg.trajectory import Trajectory
from t2i_rl.models.autoregressive.interleaved import InterleavedJanus
from t2i_rl.models.autoregressive.segments import BOTH, Segment
from t2i_rl.shapes.oracle import detect
from t2i_rl.shapes.reflections import reflect
from t2i_rl.shapes.render import render
from t2i_rl.shapes.scene import Object, Scene
from tests.support.tiny import load_tiny_janus, save_tiny_janus


def row(prompt: str, strict: bool, named=(), faults=(), unfinished: bool = False) -> dict:
    reflection = {"named": list(named), "faults": list(faults), "unfinished": unfinished}
    return {"prompt_id": prompt, "sample_index": 0, "strict": strict} | reflection


def test_what_reflections_did_by_hand():
    before = [row("a", False), row("b", False), row("c", True), row("d", True), row("e", True)]
    after = [
        row("a", True, ["no cross"], ["no cross", "a red ring"]),
        row("b", False, ["no ring"], ["no cross"], unfinished=True),
        row("c", True),
        row("d", False, ["no cross"]),
        row("e", True),
    ]
    found = {name: (cell["mean"], cell["n_images"]) for name, cell in reflection_metrics(before, after).items()}
    assert found == {
        "mends": (0.5, 2),
        "breaks": (pytest.approx(1 / 3), 3),
        "names_defect": (0.5, 2),
        "flags": (1.0, 2),
        "false_alarms": (pytest.approx(1 / 3), 3),
        "unfinished": (0.2, 5),
    }
    assert reflection_metrics(before[:2], after[:2]).keys() == {"mends", "names_defect", "flags", "unfinished"}


def test_the_stop_takes_the_first_picture_that_nothing_is_wrong_with():
    assert stopped_at(["a plan stop.", "no ring: draw.", "fine. stop.", "more"], "stop.") == 1
    assert stopped_at(["a plan", "no ring", "no cross"], "stop.") == 2
    assert stopped_at(["a plan", "one object. stop."], "stop.") == 0


def test_faults_of_the_benchmark_are_those_that_reflections_are_taught_with():
    bench = Shapes(prompts_per_task=2)
    prompts = bench.prompts()
    images = np.stack([render(Scene((Object("cross", "black", 16.0, 16.0, 5.0),)))] * len(prompts))
    for prompt, found, faults in zip(prompts, detect(images), bench.faults(images, prompts), strict=True):
        taught = reflect(prompt, found, 32, np.random.default_rng(9))
        assert faults == list(taught.faults) == list(bench.named(taught.text))


@pytest.fixture(scope="module")
def inter(tmp_path_factory):
    return InterleavedJanus(load_tiny_janus(save_tiny_janus(tmp_path_factory.mktemp("janus"))))


class Brightness(Reward):
    """A reward that reads pictures alone."""

    def __init__(self):
        self.network = torch.nn.Linear(1, 1)

    def __call__(self, rollout):
        return RewardOutput(torch.tensor([float(image.mean()) for image in rollout.images], dtype=torch.float64))


JUDGE = Brightness()


def evaluator(inter, folder, batch_size: int = 4, judge=JUDGE, **options) -> TurnsEvaluator:
    bench = Shapes(split="validation", prompts_per_task=1, samples_per_prompt=2)
    loop = Rounds(rounds=3, max_tokens=6, retries=0, stop="stop.", policy="window", choose=True, **options)
    return TurnsEvaluator(inter, loop, judge, bench, folder / "trained_turns", 0, batch_size)


def trainer() -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet)


def without_seconds(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_every_turn_is_a_stage_whatever_the_batch_and_answers_are_read_off(inter, tmp_path):
    records = evaluate(trainer(), evaluator(inter, tmp_path / "a"))
    assert list(records) == ["trained_turn1", "trained_turn2", "trained_turn3", "trained_stopped", "trained_chosen"]
    again = evaluate(trainer(), evaluator(inter, tmp_path / "b", batch_size=12))
    last_turns, same_turns = without_seconds(records["trained_turn3"]), without_seconds(again["trained_turn3"])
    assert last_turns == same_turns and len(last_turns) == 12
    for number, chosen in enumerate(records["trained_chosen"]):
        scores = [records[f"trained_turn{turn}"][number]["judge_score"] for turn in (1, 2, 3)]
        assert chosen["turn"] == 1 + int(np.argmax(scores))
        assert chosen["image"].startswith(f"../trained_turn{chosen['turn']}/")
        assert (tmp_path / "a" / "trained_chosen" / chosen["image"]).is_file()
    first = records["trained_turn1"][0]
    assert "faults" not in first and {"faults", "named", "says_stop"} <= set(records["trained_turn2"][0])
    marked = (tmp_path / "a" / "trained_turn1" / "records.jsonl").stat().st_mtime_ns
    evaluate(trainer(), evaluator(inter, tmp_path / "a"))
    assert (tmp_path / "a" / "trained_turn1" / "records.jsonl").stat().st_mtime_ns == marked  # read back
    evaluate(trainer(), evaluator(inter, tmp_path / "a", reflection_scale=3.0))
    assert (tmp_path / "a" / "trained_turn1" / "records.jsonl").stat().st_mtime_ns != marked  # drawn otherwise


def test_what_another_judge_chose_is_not_read_back(inter, tmp_path):
    one, other = Brightness(), Brightness()
    first, same, second = (evaluator(inter, tmp_path, judge=judge).fingerprint() for judge in (one, one, other))
    assert first == same != second


def test_stages_compare_turn_with_turn(inter, tmp_path):
    class Three(TurnsDrawer):
        def evaluator(self, stage, benchmark, folder, seed, batch_size):
            return evaluator(inter, folder.parent)

    bench = Shapes(split="validation", prompts_per_task=1, samples_per_prompt=2)
    stages = Stages(trainer(), Three(inter.janus), bench, tmp_path, 0, 12)
    stages.draw("trained_turns")
    summary = stages.summary()
    pairs = [(each["a"], each["b"]) for each in summary["comparisons"]]
    assert ("trained_turn1", "trained_turn2") in pairs and ("trained_turn2", "trained_turn3") in pairs
    assert ("trained_turn1", "trained_chosen") in pairs
    turn = summary["stages"]["trained_turn2"]["metrics"]
    assert {"overall", "diversity", "text_tokens", "seconds", "unfinished"} <= set(turn)
    assert turn["unfinished"]["mean"] > 0.5
    did, against = (selected_table(summary, Selection.read(content)) for content in summary["tables"])
    assert (did.title, against.title) == ("What each turn did", "Turn against turn")
    assert did.columns == ["", "trained_turn1", "trained_turn2", "trained_turn3"]
    assert [row[0] for row in did.rows][-2:] == ["tokens of text", "seconds a picture (a batch's, shared out)"]
    assert "trained_turn2 - trained_turn1" in against.columns and against.rows[0][0] == "overall (strict)"
    assert all(len(each) == len(table.columns) for table in (did, against) for each in table.rows)
    assert turn_tables([Stage.parse("base_plan")], []) == []


def drawn() -> Trajectory:
    image = render(Scene((Object("cross", "black", 16.0, 16.0, 5.0),)))
    segments = (
        Segment("prompt", text="a cross"),
        Segment("think", text="one object."),
        Segment("draw", image=image, seen_by=BOTH),
        Segment("reflect", text="stop."),
    )
    return Trajectory(segments, 7, {"rounds": 2}, [3, 2], [False, True], [0.5], [], 0)


def test_a_trajectory_on_disk_is_the_trajectory(tmp_path):
    save_trajectory(tmp_path / "t", drawn())
    assert load_trajectory(tmp_path / "t") == drawn()
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"trajectory.json", "turn1.png", "strip.png"}
    (tmp_path / "t" / "turn1.png").write_bytes(b"x")
    with pytest.raises(UserError, match="segment 2: turn1.png cannot be read as an image"):
        load_trajectory(tmp_path / "t")
    (tmp_path / "t" / "trajectory.json").write_text("{}")
    with pytest.raises(UserError, match="the key 'segments' is missing"):
        load_trajectory(tmp_path / "t")


def test_strips_leave_white_what_was_not_drawn():
    more = drawn()
    more.segments += (Segment("redraw", image=more.images[0]),)
    picture = strips([drawn(), more], [[True], [True, False]])
    single = strips([drawn()])
    assert picture.width > single.width and picture.height > single.height
