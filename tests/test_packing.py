"""Which group goes to which rank, which row to which micro-batch, and how completions share a prompt: pure parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.attention import position_shift, predicting_position, shared_prompt_mask
from learner.packing import MICRO_BATCH_OVERHEAD, pack, shard, share_prompt

lengths_and_budget = st.lists(st.integers(1, 60), max_size=40).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(max(lengths, default=1), 200))
)


@given(lengths_and_budget)
def test_pack_places_every_sample_once_within_the_budget(case: tuple[list[int], int]):
    lengths, budget = case
    batches = pack(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch and len(batch) * max(lengths[i] for i in batch) <= budget


def test_pack_by_hand():
    # by length: 5 (index 2), 4 (0), 4 (3), 2 (1). Two to a batch fit 10; 5 + 4 and 4 + 2 pad to 18, which is the least
    assert pack([4, 2, 5, 4], 10) == [[2, 0], [3, 1]]
    # padding six rows of 100 to 500 costs 2400 tokens more than a batch of their own
    assert pack([500, 500, *[100] * 6], 10**6) == [[0, 1], [2, 3, 4, 5, 6, 7]]
    assert pack([110, 110, *[100] * 6], 10**6) == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_pack_names_the_knob_for_a_sample_over_budget():
    with pytest.raises(ValueError, match=r"11 tokens does not fit .* 10 \(learner.micro_batch_tokens\)"):
        pack([3, 11], 10)


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 5))
def test_shard_deals_out_every_group_once_and_evenly(tokens: list[int], ranks: int):
    shards = shard(tokens, ranks)
    assert len(shards) == ranks
    assert sorted(i for members in shards for i in members) == list(range(len(tokens)))
    loads = [sum(tokens[i] for i in members) for members in shards]
    # Graham's bound for largest-first, against the trivial lower bounds of the optimum
    best = max([sum(tokens) / ranks, *tokens] if tokens else [0])
    assert max(loads) <= best * 4 / 3 + max(tokens, default=0) / 3 + 1e-9


def test_shard_by_hand():
    assert shard([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]


SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1], [0, 0, 1, 1, 1, 1, 2, -1, -1]])


def test_positions_of_completions_that_share_a_prompt():
    positions = torch.arange(9) - position_shift(SEGMENTS)
    assert positions[0, :8].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert positions[1, :7].tolist() == [0, 1, 2, 3, 4, 5, 2]


def test_who_predicts_whom():
    assert predicting_position(SEGMENTS)[0, :8].tolist() == [0, 0, 1, 2, 3, 2, 5, 6]
    assert predicting_position(SEGMENTS)[1, :7].tolist() == [0, 0, 1, 2, 3, 4, 1]


def test_a_single_completion_is_an_ordinary_sequence():
    segments = torch.tensor([[0, 0, 1, 1, 1, -1]])
    assert predicting_position(segments)[0, 1:5].tolist() == [0, 1, 2, 3]
    assert position_shift(segments)[0, :5].tolist() == [0] * 5
    assert torch.equal(shared_prompt_mask(segments)[0, 0, :5, :5], torch.ones(5, 5, dtype=torch.bool).tril())


@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=4)), min_size=1, max_size=3)
)
def test_a_token_sees_its_prompt_and_its_own_past_and_nothing_else(rows: list[tuple[int, list[int]]]):
    length = max(p + sum(c) for p, c in rows)
    segments = torch.full((len(rows), length), -1)
    for b, (prompt, completions) in enumerate(rows):
        ids = [0] * prompt + [k for k, n in enumerate(completions, 1) for _ in range(n)]
        segments[b, : len(ids)] = torch.tensor(ids)
    mask = shared_prompt_mask(segments)[:, 0]
    for b in range(len(rows)):
        for q in range(length):
            mine = segments[b, q].item()
            for k in range(length):
                theirs = segments[b, k].item()
                expected = (k <= q and mine >= 0 and theirs in (0, mine)) or k == 0
                assert mask[b, q, k].item() == expected, (b, q, k)
    assert mask.any(-1).all()  # a query that sees nothing would be NaN


def test_long_prompts_are_shared_and_long_completions_are_not():
    def rows(prompt: int, completion: int, count: int = 8) -> list[int]:
        return [len(row) for row in share_prompt(prompt, [completion] * count, 512, 10**6)]

    assert rows(1000, 32) == [8]
    assert rows(17, 12) == [8]
    assert rows(28, 256) == [1] * 8
    # 76 + 64 n tokens cost 178, 285, 408, 543, 692 for n = 1..5: 3 + 3 + 2 cost 1101, 4 + 4 1086, 8 at once 1245
    assert rows(76, 64) == [4, 4]
    assert rows(10, 10, 1) == [1]
    assert share_prompt(10, [], 512, 100) == []


def test_one_long_completion_does_not_part_its_short_siblings():
    assert share_prompt(20, [8, 8, 500, 8], 512, 10**6) == [[2], [0, 1, 3]]


def test_a_row_holds_no_more_than_the_budget():
    assert share_prompt(60, [20, 20, 20], 512, 100) == [[0], [1, 2]]  # 60 + 2 x 20
    assert share_prompt(60, [50, 20, 20], 512, 100) == [[0], [1, 2]]  # the first is over budget by itself


@given(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 200))
def test_rows_are_the_cheapest_of_all_cuts_by_length(prompt: int, lengths: list[int], break_even: int):
    def cost(rows: list[list[int]]) -> float:
        tokens = [prompt + sum(lengths[i] for i in row) for row in rows]
        return sum(t * (1 + t / break_even) for t in tokens)

    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    found = share_prompt(prompt, lengths, break_even, 10**6)
    assert [i for row in found for i in row] == order
    assert cost(found) <= min(cost(cut) for cut in _all_cuts(order)) * (1 + 1e-12)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=7))
def test_micro_batches_are_the_cheapest_of_all_cuts_by_length(lengths: list[int]):
    budget = 2000

    def cost(batches: list[list[int]]) -> float:
        padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        return sum(p + MICRO_BATCH_OVERHEAD if p <= budget else float("inf") for p in padded)

    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    assert cost(pack(lengths, budget)) == min(cost(cut) for cut in _all_cuts(order))


def _all_cuts(order: list[int]) -> list[list[list[int]]]:
    """Every way to cut a sequence into consecutive runs."""
    if not order:
        return [[]]
    return [[order[:n], *rest] for n in range(1, len(order) + 1) for rest in _all_cuts(order[n:])]
