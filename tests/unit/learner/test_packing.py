"""Which group goes to which rank, which group to which micro-batch: pure functions of sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batching.packing import (
    MICRO_BATCH_OVERHEAD,
    GroupCost,
    Size,
    balance,
    fewest_bins,
    pack_padded,
    shard,
    split_group,
)

LIMITS = Size(100, 60, 40, 1000)


def table(*sizes: tuple[int, ...]) -> np.ndarray:
    return np.array([Size(*size) for size in sizes], np.int64).reshape(-1, len(LIMITS))


def within(largest: float) -> st.SearchStrategy[tuple[int, int, int]]:
    """Sizes of at most that part of the limits."""
    return st.tuples(*(st.integers(0 if d else 1, int(limit * largest)) for d, limit in enumerate(LIMITS[:3])))


def check(bins: list[list[int]], sizes: np.ndarray, limits: Size = LIMITS) -> None:
    """Every group once, no limit exceeded."""
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all((sizes[members].sum(0) <= limits).all() for members in bins)


def fewest_by_search(sizes: np.ndarray) -> int:
    """Every assignment of groups to bins, one group after the other."""
    best = len(sizes)

    def place(i: int, bins: list[np.ndarray]) -> None:
        nonlocal best
        if len(bins) >= best:
            return
        if i == len(sizes):
            best = len(bins)
            return
        for b, load in enumerate(bins):
            if (load + sizes[i] <= LIMITS).all():
                place(i + 1, [*bins[:b], load + sizes[i], *bins[b + 1 :]])
        place(i + 1, [*bins, sizes[i]])

    place(0, [])
    return best


def lower_bound(sizes: np.ndarray, limits: Size = LIMITS) -> int:
    """No packing has fewer bins: in each dimension the sums of Fekete and Schepers' dual feasible functions u_k (2001),
    of which k -> infinity is the volume."""
    best = 0
    for sums, limit in zip(sizes.T, limits, strict=True):
        best = max(best, math.ceil(sums.sum() / limit))
        for k in range(1, 20):
            exact = (sums * (k + 1)) % limit == 0
            values = np.where(exact, sums * k, (sums * (k + 1)) // limit * limit)  # of u_k, times k x limit
            best = max(best, math.ceil(values.sum() / (k * limit)))
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(within(1.0), max_size=8))
def test_few_groups_take_as_few_micro_batches_as_any_search_finds(sizes: list[tuple[int, int, int]]):
    bins = fewest_bins(table(*sizes), LIMITS)
    check(bins, table(*sizes))
    assert len(bins) == fewest_by_search(table(*sizes))


@settings(max_examples=100, deadline=None)
@given(st.lists(within(0.5), min_size=9, max_size=10))
def test_up_to_ten_groups_are_packed_exactly(sizes: list[tuple[int, int, int]]):
    bins = fewest_bins(table(*sizes), LIMITS)
    check(bins, table(*sizes))
    assert len(bins) == fewest_by_search(table(*sizes))


@settings(max_examples=200, deadline=None)
@given(st.integers(11, 400), st.sampled_from([0.05, 0.1, 0.2]), st.booleans(), st.integers(0, 2**32 - 1))
def test_many_groups_are_within_five_percent_of_the_lower_bound(count: int, largest: float, together: bool, seed: int):
    """Five groups and more fit a micro-batch, in each dimension; the dimensions go together, or have nothing to do
    with each other. A bin more than 5 % is granted, for a bound that is rounded up."""
    random = np.random.default_rng(seed)
    limits = Size(100_000, 70_000, 40_000, 400_000)
    parts = random.uniform(0.0, largest, (count, 4))
    if together:
        parts = np.clip(parts[:, :1] * random.uniform(0.5, 1.0, (count, 4)), 0.0, 1.0)
    sizes = np.maximum(1, parts * limits).astype(np.int64)
    bins = fewest_bins(sizes, limits)
    check(bins, sizes, limits)
    assert len(bins) <= math.ceil(1.05 * lower_bound(sizes, limits))


@pytest.mark.parametrize("largest", [1 / 16, 1 / 4, 1.0])
def test_ten_thousand_groups_are_packed_within_five_percent(largest: float):
    random = np.random.default_rng(0)
    limits = Size(100_000, 70_000, 40_000, 400_000)
    tokens = random.uniform(0.1, 1.0, 10_000) * largest
    sizes = np.stack([tokens * 100_000, tokens * 50_000, tokens * 20_000, tokens * 300_000], 1).astype(np.int64)
    bins = fewest_bins(sizes, limits)
    check(bins, sizes, limits)
    assert len(bins) <= math.ceil(1.05 * lower_bound(sizes, limits))


@settings(deadline=None)
@given(st.lists(within(1.0), max_size=30), st.integers(0, 5), st.integers(1, 4))
def test_all_ranks_get_as_many_micro_batches_within_the_limits(
    sizes: list[tuple[int, int, int]], more: int, ranks: int
):
    costs = [float(t) for t, _, _ in sizes]
    shards = shard(costs, ranks)
    parts = [table(*(sizes[i] for i in own)) for own in shards]
    bins = [fewest_bins(part, LIMITS) for part in parts]
    count = max(map(len, bins)) + more
    for own, part, found in zip(shards, parts, bins, strict=True):
        balanced = balance(found, part, LIMITS, [costs[i] for i in own], count)
        check(balanced, part)
        assert len(balanced) == count
        assert sum(1 for members in balanced if not members) == max(0, count - len(part))
        loads = [sum(costs[own[i]] for i in members) for members in balanced]
        assert loads == sorted(loads, reverse=True)


def test_micro_batches_of_one_rank_cost_alike():
    sizes = table(*[(30, 0, 0)] * 3, *[(10, 0, 0)] * 3)
    bins = fewest_bins(sizes, LIMITS)
    assert len(bins) == 2
    assert balance(bins, sizes, LIMITS, [30.0] * 3 + [10.0] * 3, 3) == [[0, 3], [1, 4], [2, 5]]


def test_each_limit_counts():
    assert len(fewest_bins(table((50, 0, 0), (50, 0, 0)), LIMITS)) == 1
    assert len(fewest_bins(table((51, 0, 0), (50, 0, 0)), LIMITS)) == 2
    assert len(fewest_bins(table((1, 31, 0), (1, 30, 0)), LIMITS)) == 2
    assert len(fewest_bins(table((1, 0, 21), (1, 0, 20)), LIMITS)) == 2
    assert len(fewest_bins(table((1, 0, 0, 501), (1, 0, 0, 500)), LIMITS)) == 2
    assert fewest_bins(table(), LIMITS) == []


def test_a_group_that_fits_is_not_split_and_another_by_completions():
    prompt = Size(40, 60, 0)
    assert split_group(prompt, [Size(10, 0, 10)] * 4, LIMITS) == [[0, 1, 2, 3]]
    parts = split_group(prompt, [Size(25, 0, 5)] * 5, LIMITS)  # 40 + 2 x 25 tokens
    assert sorted(map(len, parts)) == [1, 2, 2] and sorted(i for part in parts for i in part) == [0, 1, 2, 3, 4]
    assert len(split_group(prompt, [Size(1, 0, 21)] * 2, LIMITS)) == 2
    assert split_group(prompt, [], LIMITS) == []


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (Size(90), Size(11, 0, 1), r"101 tokens, a micro-batch takes 100: raise learner.micro_batch"),
        (Size(1, 61), Size(1, 0, 1), r"61 patches, a micro-batch takes 60"),
        (Size(1), Size(41, 0, 41), r"41 logits rows, a micro-batch takes 40"),
    ],
)
def test_what_can_not_be_split_is_refused(prompt: Size, completion: Size, message: str):
    with pytest.raises(ValueError, match=message):
        split_group(prompt, [Size(1, 0, 1), completion], LIMITS)


def test_the_cost_of_a_group_by_hand():
    # 10 + 4 + 6 tokens; 10^2/2 + 4 x 10 + 4^2/2 + 6 x 10 + 6^2/2 = 176 pairs
    assert GroupCost(True, 100)(10, [4, 6]) == 20 + 176 / 100
    # the prompt twice: 30 tokens, 50 pairs more
    assert GroupCost(False, 100)(10, [4, 6]) == 30 + 226 / 100
    # 8 of the prompt's tokens are an image's, which is encoded once
    assert GroupCost(True, 100, 0.5)(10, [4, 6], 8) == pytest.approx(20 + 176 / 100 + 4)
    assert GroupCost(False, 100, 0.5)(10, [4, 6], 8) == pytest.approx(30 + 226 / 100 + 4)


lengths_and_budget = st.lists(st.integers(1, 60), max_size=40).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(max(lengths, default=1), 200))
)


def padded(lengths: list[int], budget: int) -> list[list[int]]:
    return pack_padded(table(*((n, 0, 0) for n in lengths)), Size(budget))


@given(lengths_and_budget)
def test_padded_rows_are_placed_once_within_the_budget(case: tuple[list[int], int]):
    lengths, budget = case
    batches = padded(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch and len(batch) * max(lengths[i] for i in batch) <= budget


def test_padded_rows_by_hand():
    # by length: 5 (index 2), 4 (0), 4 (3), 2 (1). Two to a batch fit 10; 5 + 4 and 4 + 2 pad to 18, which is the least
    assert padded([4, 2, 5, 4], 10) == [[2, 0], [3, 1]]
    # padding six rows of 100 to 500 costs 2400 tokens more than a batch of their own
    assert padded([500, 500, *[100] * 6], 10**6) == [[0, 1], [2, 3, 4, 5, 6, 7]]
    assert padded([110, 110, *[100] * 6], 10**6) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    # patches and logits rows count too
    assert len(pack_padded(table(*[(10, 30, 10)] * 4), LIMITS)) == 2


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


@given(st.lists(st.integers(1, 900), min_size=1, max_size=7))
def test_padded_micro_batches_are_the_cheapest_of_all_cuts_by_length(lengths: list[int]):
    budget = 2000

    def cost(batches: list[list[int]]) -> float:
        tokens = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        return sum(t + MICRO_BATCH_OVERHEAD if t <= budget else float("inf") for t in tokens)

    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    assert cost(padded(lengths, budget)) == min(cost(cut) for cut in _all_cuts(order))


def _all_cuts(order: list[int]) -> list[list[list[int]]]:
    """Every way to cut a sequence into consecutive runs."""
    if not order:
        return [[]]
    return [[order[:n], *rest] for n in range(1, len(order) + 1) for rest in _all_cuts(order[n:])]
