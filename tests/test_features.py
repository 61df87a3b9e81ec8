"""FeatureCache against a plain dictionary: what it holds is right, what leaves first was used least recently, both of
its bounds hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.features import FeatureCache, Features, size_of


class Store:
    """A spill in memory that gives out what it was given, read-only as an object store does."""

    def __init__(self) -> None:
        self.held: dict[int, np.ndarray] = {}
        self.puts = 0

    def put(self, data: np.ndarray) -> int:
        assert data.dtype == np.uint8 and data.ndim == 1
        self.puts += 1
        kept = data.copy()
        kept.setflags(write=False)
        self.held[self.puts] = kept
        return self.puts

    def get(self, handle: Any) -> np.ndarray:
        return self.held[handle]


def features(seed: int, rows: int = 1, tokens: int = 2, dtype: torch.dtype = torch.float32) -> Features:
    """8 columns: 64 bytes a row of 2 tokens in float32."""
    random = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(tokens, 8, generator=random).to(dtype),) for _ in range(rows))


def assert_equal(ours: Features | None, expected: Features) -> None:
    assert ours is not None and len(ours) == len(expected)
    for row, exact in zip(ours, expected, strict=True):
        assert len(row) == len(exact)
        for tensor, value in zip(row, exact, strict=True):
            assert tensor.dtype == value.dtype and torch.equal(tensor, value)


@settings(max_examples=200)
@given(
    limit=st.integers(0, 400),
    spill_limit=st.integers(0, 400),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 3)), max_size=60),
)
def test_what_it_holds_is_right_and_within_bounds(
    limit: int, spill_limit: int, steps: list[tuple[bool, int, int]]
) -> None:
    cache, model = FeatureCache(limit, Store(), spill_limit), dict[int, Features]()
    for number, (is_put, key, rows) in enumerate(steps):
        if is_put:
            model[key] = features(number, rows)
            assert_equal(cache.put(key, model[key]), model[key])
        elif (found := cache.get(key)) is not None:
            assert_equal(found, model[key])
        assert cache.local_bytes <= limit and cache.spilled_bytes <= spill_limit
    held = [found for key in model if (found := cache.get(key)) is not None]
    assert len(held) <= len(model)
    if sum(map(size_of, model.values())) <= limit:
        assert len(held) == len(model)
    counts = cache.take_counts()
    assert counts.stored == sum(is_put for is_put, _, _ in steps)
    assert cache.take_counts().stored == 0


@given(uses=st.lists(st.integers(0, 9), max_size=40), room=st.integers(1, 6), spilled=st.integers(0, 6))
def test_what_was_used_least_recently_leaves_first(uses: list[int], room: int, spilled: int) -> None:
    """Items of one size: in memory the `room` used last, in the spill those before them."""
    cache, order = FeatureCache(64 * room, Store(), 64 * spilled), list[int]()
    for key in uses:
        there = cache.get(key)
        assert (there is not None) == (key in order[-room - spilled :])
        if there is None:
            cache.put(key, features(key))
        else:
            assert_equal(there, features(key))
        order = [k for k in order if k != key] + [key]
    assert [*cache._local] == order[-room:]
    assert [*cache._spilled] == order[-room - spilled : -room]


def test_what_is_spilled_comes_back_with_its_rows_layers_and_precision() -> None:
    store = Store()
    cache = FeatureCache(0, store, 2**20)
    given_ = (
        (torch.randn(1, 3, 8).bfloat16(), torch.randn(3, 8).bfloat16()),
        (torch.randn(1, 2, 8).bfloat16(), torch.randn(2, 8)),
    )
    cache.put("a", given_)
    assert cache.local_bytes == 0 and cache.spilled_bytes == size_of(given_) and store.puts == 1
    assert_equal(cache.get("a"), given_)
    counts = cache.take_counts()
    assert (counts.hits, counts.spilled_hits, counts.stored, counts.dropped) == (1, 1, 1, 0)


def test_without_a_spill_what_leaves_is_dropped() -> None:
    cache = FeatureCache(64)
    for key in "ab":
        cache.put(key, features(ord(key)))
    assert cache.get("a") is None and cache.get("b") is not None and len(cache) == 1
    assert cache.take_counts().dropped == 1


@pytest.mark.parametrize("limit", [1000, 0])
def test_a_row_does_not_keep_the_batch_it_was_computed_in(limit: int) -> None:
    whole = torch.randn(1000, 8)
    cache = FeatureCache(limit, Store(), 1000)
    kept = cache.put("a", ((whole[3:5],),))
    assert kept[0][0].untyped_storage().nbytes() == 64
    whole.zero_()
    assert_equal(cache.get("a"), kept)
    assert kept[0][0].abs().min() > 0
