"""How ranks meet: whoever has fewer passes repeats its last one for nothing, so that none waits for another."""

import pytest
import torch
import torch.distributed as dist

from t2i_rl.methods.ranks import in_step, most_over_ranks, sum_over_ranks

CPU = torch.device("cpu")


def test_alone_each_pass_counts_once_and_the_last_is_the_last():
    passes = in_step(["a", "b", "c"], CPU)
    assert [part.content for part in passes] == ["a", "b", "c"] and [part.number for part in passes] == [0, 1, 2]
    assert [part.counts for part in passes] == [1.0, 1.0, 1.0]
    assert [part.last for part in passes] == [False, False, True]


@pytest.mark.parametrize("others, repeated", [(2, 0), (3, 1), (5, 3)])
def test_a_rank_with_fewer_passes_repeats_its_last_one_and_that_counts_nothing(monkeypatch, others, repeated):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda count, op: count.copy_(torch.maximum(count, torch.tensor(others))))
    passes = in_step(["a", "b"], CPU)
    assert [part.content for part in passes] == ["a", "b", *["b"] * repeated]
    assert [part.counts for part in passes] == [1.0, 1.0, *[0.0] * repeated]
    assert [part.last for part in passes] == [*[False] * (1 + repeated), True]
    assert all(part.number == min(place, 1) for place, part in enumerate(passes))


def test_numbers_alone_are_their_own_sums():
    assert sum_over_ranks({"text": 3, "image": 0.1}, CPU) == {"text": 3.0, "image": 0.1}
    assert most_over_ranks(7, CPU) == 7
