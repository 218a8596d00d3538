"""The stream of prompts: every epoch a permutation, ranks without repeats, a resumed stream the
same as an uninterrupted one."""

from itertools import islice

import pytest

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt, read_prompts, write_prompts
from t2i_rl.data.prompts import PromptBatches, PromptData

PROMPTS = [Prompt(str(i), f"prompt {i}") for i in range(12)]


def indices(batches: PromptBatches, count: int) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in islice(batches, count)]


def test_an_epoch_is_a_permutation_and_the_next_another():
    drawn = sum(indices(PromptBatches(PROMPTS, 4, seed=0), 6), [])
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12)) and drawn[:12] != drawn[12:]


def test_ranks_split_the_global_batch_without_repeats():
    whole = indices(PromptBatches(PROMPTS, 4, seed=3), 9)
    parts = [indices(PromptBatches(PROMPTS, 4, seed=3, rank=rank, world_size=2), 9) for rank in (0, 1)]
    assert [left + right for left, right in zip(*parts, strict=True)] == whole


def test_a_resumed_stream_goes_on_where_it_stopped():
    assert indices(PromptBatches(PROMPTS, 5, seed=1, first=4), 5) == indices(PromptBatches(PROMPTS, 5, seed=1), 9)[4:]


def test_prompt_files(tmp_path):
    write_prompts(tmp_path / "a.jsonl", [Prompt("x", "a cat", "animals", {"include": []})])
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt("x", "a cat", "animals", {"include": []})]
    (tmp_path / "b.txt").write_text("a cat\n\n a dog \n")
    assert [prompt.text for prompt in read_prompts(tmp_path / "b.txt")] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "does not exist"),
        ("", "no prompt"),
        ('{"text": 1}', ":1:"),
        ('{"prompt": "ok"}\n{broken', ":2 is not JSON"),
    ],
)
def test_a_broken_prompt_file_is_named_with_its_line(tmp_path, content, named):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=named) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_too_few_prompts_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="only 2 prompts"):
        PromptData(path=str(tmp_path / "p.txt"), batch_size=3)
