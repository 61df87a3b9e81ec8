"""FeatureCache: cached features or cached tower outputs, found by the content of the media. No Ray here.

put ─▶ memory of the rank, within `limit` ─▶ and the Store that all ranks share, within a limit of its own
get ─▶ memory of the rank ─▶ Store ─▶ nothing: the caller computes it again
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlm.encoding import FeatureRow

Key = Hashable
Features = tuple[FeatureRow, ...]
"""All rows of one item, on the CPU: its features, or its tower outputs."""
V = TypeVar("V")


class BoundedLRU(Generic[V]):
    """A dictionary of at most `limit` bytes, which drops the least recently used entries."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._entries: OrderedDict[Key, tuple[V, int]] = OrderedDict()

    def get(self, key: Key) -> V | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Key, value: V, size: int) -> None:
        """Store a value, unless it is larger than the limit."""
        self.held -= self._entries.pop(key, (None, 0))[1]
        if size > self.limit:
            return
        self._entries[key] = value, size
        self.held += size
        while self.held > self.limit:
            self.held -= self._entries.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> Iterator[Key]:
        """All keys, the least recently used first."""
        return iter(self._entries)


@dataclass(frozen=True)
class Packed:
    """The features of an item for a store of bytes."""

    data: np.ndarray
    """uint8 `[n]`: all tensors end to end."""
    layout: tuple[tuple[tuple[torch.dtype, tuple[int, ...]], ...], ...]
    """The type and shape of each tensor of each row."""

    @classmethod
    def of(cls, features: Features) -> Packed:
        parts = [tensor.flatten().view(torch.uint8) for row in features for tensor in row]
        data = torch.cat(parts).numpy() if parts else np.zeros(0, np.uint8)
        return cls(data, tuple(tuple((t.dtype, tuple(t.shape)) for t in row) for row in features))

    def unpack(self) -> Features:
        at, rows = 0, []
        for row in self.layout:
            tensors = []
            for dtype, shape in row:
                end = at + torch.Size(shape).numel() * dtype.itemsize
                # Copied: an object store's arrays are read-only, and one tensor must not hold the others in memory.
                tensors.append(torch.from_numpy(self.data[at:end].copy()).view(dtype).view(shape))
                at = end
            rows.append(tuple(tensors))
        return tuple(rows)


class Store(Protocol):
    """A place where all ranks leave features for each other. It bounds its own size."""

    def put(self, items: Mapping[Key, Packed]) -> None: ...

    def get(self, keys: Sequence[Key]) -> Mapping[Key, Packed]:
        """Return those of `keys` that are (still) there."""


@dataclass
class CacheCounts:
    """Counts of items since the counts were last taken."""

    hits: int = 0
    """Items that were found, in memory or in the store."""
    store_hits: int = 0
    stored: int = 0


class FeatureCache:
    """The cached values of items, by key, for one rank. Not thread-safe."""

    def __init__(self, limit: int, store: Store | None = None) -> None:
        """`limit` is in bytes of the rank's memory."""
        self._local: BoundedLRU[Features] = BoundedLRU(limit)
        self._store = store
        self._counts = CacheCounts()

    @property
    def local_bytes(self) -> int:
        return self._local.held

    def get(self, keys: Sequence[Key]) -> dict[Key, Features]:
        """Return what is cached of distinct `keys`. These become the most recently used."""
        looked_up = {key: self._local.get(key) for key in keys}
        found = {key: features for key, features in looked_up.items() if features is not None}
        absent = [key for key in keys if key not in found]
        if self._store is not None and absent:
            for key, packed in self._store.get(absent).items():
                found[key] = packed.unpack()
                self._local.put(key, found[key], size_of(found[key]))
                self._counts.store_hits += 1
        self._counts.hits += len(found)
        return found

    def put(self, items: Mapping[Key, Features]) -> dict[Key, Features]:
        """Store the features of items. Returns them, in memory of their own."""
        own = {key: tuple(tuple(map(_of_its_own, row)) for row in features) for key, features in items.items()}
        for key, features in own.items():
            self._local.put(key, features, size_of(features))
        if self._store is not None and own:
            self._store.put({key: Packed.of(features) for key, features in own.items()})
        self._counts.stored += len(own)
        return own

    def take_counts(self) -> CacheCounts:
        """Return the counts since the last call."""
        counts, self._counts = self._counts, CacheCounts()
        return counts


def size_of(features: Features) -> int:
    return sum(tensor.nbytes for row in features for tensor in row)


def _of_its_own(tensor: Tensor) -> Tensor:
    """Copy a tensor that shares memory with others of its batch: it would hold all of them in memory."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
