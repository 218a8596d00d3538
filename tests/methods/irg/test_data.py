"""IRG's six modes and its published file format: what is learnt in each, both ways through parquet, and every silent
drop as an error."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.methods.irg import data as irgl
from t2i_rl.methods.irg.toy_format import conversation, parsed, png, read_toy, segments_of, write_shard
from t2i_rl.methods.irg.trajectory import MODES, STAGES, Trajectory, in_mode
from t2i_rl.models.autoregressive.segments import BOTH, Segment

# (texts learnt, pictures learnt, texts of the context, pictures of the context)
COUNTS = {
    "initial_thinking_understanding_learning": (1, 0, 2, 1),
    "initial_thinking_generation_learning": (1, 0, 1, 0),
    "initial_full_learning": (1, 1, 1, 0),
    "improving_thinking_understanding_learning": (1, 0, 2, 2),
    "improving_thinking_generation_learning": (1, 0, 2, 1),
    "improving_full_learning": (1, 1, 2, 1),
}
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def made(mode: str) -> tuple[Segment, ...]:
    """A sample of a mode, every text another."""
    found = []
    for number, part in enumerate(MODES[mode]):
        content = {"text": f"text {number}"} if part.kind == "text" else {"image": PICTURE + np.uint8(number)}
        seen = BOTH if part.kind == "image" and not part.loss else frozenset()
        found.append(Segment(part.role, **content, loss=part.loss, seen_by=seen))
    return tuple(found)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_learns_what_the_paper_says(mode):
    segments = made(mode)
    assert in_mode(segments, mode, "here") == segments
    counted = tuple(
        sum(segment.loss == loss and segment.kind == kind for segment in segments)
        for loss in (True, False)
        for kind in ("text", "image")
    )
    assert counted == COUNTS[mode]
    for segment in segments:
        if "improving" in mode and segment.role in ("think", "draw"):
            assert not segment.loss  # the weak picture, and what was thought before it, are never learnt


def test_stages_mix_modes_as_published():
    assert [STAGES[1][mode] for mode in MODES] == [0.125, 0.125, 0.25, 0.125, 0.125, 0.25]
    assert set(STAGES[2]) == {"initial_full_learning", "improving_full_learning"}
    assert all(sum(stage.values()) == 1 for stage in STAGES.values())


def test_both_ways_through_parquet(tmp_path):
    for mode in MODES:
        write_shard(tmp_path / mode / "0.parquet", [Trajectory(made(mode)), Trajectory(made(mode))])
    found = list(read_toy(tmp_path))
    assert [mode for mode, _ in found] == [mode for mode in MODES for _ in range(2)]
    assert all(trajectory.segments == made(mode) for mode, trajectory in found)


def test_a_stream_decodes_the_rows_that_it_gives(tmp_path, monkeypatch):
    mode = "improving_full_learning"
    texts = [f"a picture of {number} dogs" for number in range(5)]
    write_shard(
        tmp_path / mode / "0.parquet", [Trajectory((Segment("prompt", text=text), *made(mode)[1:])) for text in texts]
    )
    read = []
    monkeypatch.setattr(irgl, "parsed", lambda *given: read.append(given[-1]) or parsed(*given))
    stream = irgl.TrajectoryStream(irgl.Trajectories(tmp_path, weights={mode: 1}).shards(), {mode: 1.0}, 2, 0, 0)
    batches = [next(rows) for rows in [iter(stream)] for _ in range(2)]
    given = [segments for batch in batches for _, _, segments in batch]
    assert [segments[0].text for segments in given] == [texts[row] for row in read] and len(set(read)) == 4
    assert all(segments[1:] == made(mode)[1:] for segments in given)


def test_the_system_text_may_be_the_first_turn():
    mode = "improving_full_learning"
    row = conversation([Segment("system", text="improve"), *made(mode)])
    found = in_mode(segments_of(row, "row 0"), mode, "row 0")
    assert found[0].role == "system" and found[1:] == made(mode)


def picture(**flags) -> dict:
    return {"type": "image", "content": base64.b64encode(png(PICTURE)).decode(), **flags}


SEEN = {"need_vae": True, "need_vit": True}
BROKEN = {
    "the role 'system' is dropped": ([{"role": "system", "content": "think"}], "turn 0: role is 'system'"),
    "a user's list is dropped": ([{"role": "user", "content": ["a"]}], "turn 0: a user's content must be a text"),
    "an assistant's text is no list": ([{"role": "assistant", "content": "a"}], "must be a list of parts"),
    "a picture without flags vanishes": (
        [{"role": "assistant", "content": [picture()]}],
        "turn 0, part 0: a picture that is neither learnt nor seen",
    ),
    "a picture that is not base64 vanishes": (
        [{"role": "assistant", "content": [picture(**SEEN) | {"content": "?!"}]}],
        "turn 0, part 0: content is no picture",
    ),
    "a picture that is no picture vanishes": (
        [{"role": "assistant", "content": [picture(**SEEN) | {"content": "aGVsbG8="}]}],
        "part 0: content cannot be read as an image",
    ),
    "base64 that is none": (
        [{"role": "assistant", "content": [picture(**SEEN) | {"content": "ä"}]}],
        "content is no picture",
    ),
    "a picture that is cut": (
        [{"role": "assistant", "content": [picture(**SEEN) | {"content": picture()["content"][:80]}]}],
        "part 0: content cannot be read as an image",
    ),
    "a misspelt flag": (
        [{"role": "assistant", "content": [picture(need_vea=True)]}],
        "the field 'need_vea' is not known",
    ),
    "a flag that is a word": (
        [{"role": "assistant", "content": [picture(need_vae="yes")]}],
        "need_vae must be true or false",
    ),
    "another part": ([{"role": "assistant", "content": [{"type": "video", "content": "a"}]}], "type is 'video'"),
    "nothing": ([], "no list of turns"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_released_parser_drops_in_silence_is_an_error(name):
    turns, said = BROKEN[name]
    with pytest.raises(UserError) as error:
        segments_of(json.dumps(turns), "shard.parquet: row 3")
    assert said in str(error.value) and str(error.value).startswith("shard.parquet: row 3")


def test_text_of_the_assistant_is_learnt_unless_it_is_said_not_to_be():
    row = json.dumps(
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "content": "a"}, {"type": "text", "content": "b", "need_loss": False}],
            }
        ]
    )
    assert [segment.loss for segment in segments_of(row, "")] == [True, False]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda segments: segments[:-1], "4 segments, where improving_full_learning has 5"),
        (
            lambda segments: [*segments[:1], Segment("think", text="a", loss=True), *segments[2:]],
            "segment 1 (think): loss is True",
        ),
        (
            lambda segments: [*segments[:2], Segment("draw", image=PICTURE, loss=True), *segments[3:]],
            "segment 2 (draw): loss is True",
        ),
        (
            lambda segments: [
                *segments[:2],
                Segment("draw", image=PICTURE, seen_by=frozenset(["generation"])),
                *segments[3:],
            ],
            "seen by both encoders",
        ),
        (lambda segments: [*segments[:2], Segment("draw", text="a"), *segments[3:]], "segment 2 (draw): kind is text"),
        (lambda segments: [Segment("prompt", text=" "), *segments[1:]], "segment 0 (prompt): the text is empty"),
        (
            lambda segments: [*segments[:3], Segment("reflect", text="", loss=True), *segments[4:]],
            "segment 3 (reflect): the text is empty",
        ),
    ],
)
def test_a_sample_that_is_not_of_its_mode_is_named(change, said):
    with pytest.raises(UserError) as error:
        in_mode(change(list(made("improving_full_learning"))), "improving_full_learning", "row 0")
    assert said in str(error.value)


def test_folders_and_files_that_are_not_of_the_format(tmp_path):
    with pytest.raises(UserError, match="no folder named as a mode is"):
        list(read_toy(tmp_path))
    place = tmp_path / "initial_full_learning"
    place.mkdir()
    with pytest.raises(UserError, match="holds no parquet file"):
        list(read_toy(tmp_path))
    (place / "0.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        list(read_toy(tmp_path))
    write_shard(place / "0.parquet", [Trajectory(made("initial_full_learning"))] * 40)
    whole = (place / "0.parquet").read_bytes()
    (place / "0.parquet").write_bytes(whole[:40] + bytes(200) + whole[240:])  # the footer is whole
    with pytest.raises(UserError, match="0.parquet: the file is damaged"):
        list(read_toy(tmp_path))
    pq.write_table(pa.table({"other": ["a"]}), place / "0.parquet")
    with pytest.raises(UserError, match="no column 'conversation'"):
        list(read_toy(tmp_path))
