"""FeatureCache against a plain dictionary: what it holds is right, what was used least recently leaves first, bounds
hold; and what one rank put away another finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.features.cache import BoundedLRU, FeatureCache, Features, Key, Packed


class MemoryStore:
    """A store in this process, whose arrays are read-only as an object store's are."""

    def __init__(self, limit: int = 2**40) -> None:
        self.known: BoundedLRU[Packed] = BoundedLRU(limit)

    def put(self, items: Mapping[Key, Packed]) -> None:
        for key, packed in items.items():
            data = packed.data.copy()
            data.setflags(write=False)
            self.known.put(key, Packed(data, packed.layout), data.nbytes)

    def get(self, keys: Sequence[Key]) -> Mapping[Key, Packed]:
        found = {key: self.known.get(key) for key in keys}
        return {key: packed for key, packed in found.items() if packed is not None}


def features(seed: int, rows: int = 1) -> Features:
    """64 bytes a row."""
    random = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(2, 8, generator=random),) for _ in range(rows))


def assert_equal(ours: Features, expected: Features) -> None:
    assert len(ours) == len(expected)
    for row, exact in zip(ours, expected, strict=True):
        assert len(row) == len(exact)
        for tensor, value in zip(row, exact, strict=True):
            assert tensor.dtype == value.dtype and torch.equal(tensor, value)


KEYS = st.lists(st.integers(0, 7), unique=True, max_size=3)


@settings(max_examples=200)
@given(
    limit=st.integers(0, 400),
    in_store=st.integers(0, 400),
    steps=st.lists(st.tuples(st.booleans(), KEYS, st.integers(0, 3)), max_size=40),
)
def test_what_it_holds_is_right_and_within_bounds(
    limit: int, in_store: int, steps: list[tuple[bool, list[int], int]]
) -> None:
    store = MemoryStore(in_store)
    cache, model = FeatureCache(limit, store), dict[int, Features]()
    for number, (is_put, keys, rows) in enumerate(steps):
        if is_put:
            new = {key: features(10 * number + key, rows) for key in keys}
            for key, value in cache.put(new).items():
                assert_equal(value, new[key])
            model |= new
        else:
            for key, value in cache.get(keys).items():
                assert_equal(value, model[key])
        assert cache.local_bytes <= limit and store.known.held <= in_store
    held = cache.get(list(model))
    for key, value in held.items():
        assert_equal(value, model[key])
    if 3 * 64 * len(model) <= max(limit, in_store):
        assert held.keys() == model.keys()
    assert cache.take_counts().stored == sum(len(keys) for is_put, keys, _ in steps if is_put)
    assert cache.take_counts().stored == 0


@given(uses=st.lists(st.integers(0, 9), max_size=60), room=st.integers(0, 6))
def test_what_was_used_least_recently_leaves_first(uses: list[int], room: int) -> None:
    cache, order = FeatureCache(64 * room + 63), list[int]()
    for key in uses:
        there = cache.get([key])
        assert set(there) == {key} & set(order)
        if not there:
            cache.put({key: features(key)})
        order = [*(k for k in order if k != key), key][-room:] if room else []
    assert [*cache._local.keys()] == order and cache.local_bytes == 64 * len(order)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 120)), max_size=60))
def test_bytes_are_counted_also_where_a_key_is_put_again(puts: list[tuple[int, int]]) -> None:
    known: BoundedLRU[int] = BoundedLRU(100)
    for key, size in puts:
        known.put(key, size, size)
        assert known.held == sum(known.get(k) or 0 for k in [*known.keys()]) <= 100
        assert known.get(key) == (size if size <= 100 else None)


def test_features_come_back_with_their_rows_layers_and_precision() -> None:
    exact = (
        (torch.randn(1, 3, 8).bfloat16(), torch.randn(3, 8).bfloat16()),
        (torch.randn(1, 2, 8).bfloat16(), torch.randn(2, 8)),
    )
    cache = FeatureCache(0, MemoryStore())
    cache.put({"a": exact, "none": ()})
    assert cache.local_bytes == 0
    assert_equal(cache.get(["a"])["a"], exact)
    assert cache.get(["none"]) == {"none": ()}
    counts = cache.take_counts()
    assert (counts.hits, counts.store_hits, counts.stored) == (2, 1, 2)


@pytest.mark.parametrize("limit", [1000, 0])
def test_a_row_does_not_keep_the_batch_it_was_computed_in(limit: int) -> None:
    whole = torch.randn(1000, 8)
    cache = FeatureCache(limit, MemoryStore())
    kept = cache.put({"a": ((whole[3:5],),)})["a"]
    assert kept[0][0].untyped_storage().nbytes() == 64
    whole.zero_()
    assert_equal(cache.get(["a"])["a"], kept)
    assert kept[0][0].abs().min() > 0


def test_what_one_rank_computed_another_finds() -> None:
    store = MemoryStore()
    one, other = FeatureCache(2**20, store), FeatureCache(2**20, store)
    one.put({"a": features(0)})
    assert_equal(other.get(["a", "b"])["a"], features(0))
    assert_equal(other.get(["a"])["a"], features(0))
    counts = other.take_counts()
    assert (counts.hits, counts.store_hits, counts.stored) == (2, 1, 0)
