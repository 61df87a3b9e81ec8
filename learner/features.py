"""FeatureCache: what towers made of media before, by content; the least recently used leaves first. No Ray here.

    put ──▶ local memory, up to `limit` bytes ──oldest──▶ Spill, up to `spill_limit` bytes ──oldest──▶ dropped
                       ▲────────────────── get ────────────────┘
What was dropped is computed again by whoever misses it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vlm.encoded import FeatureRow

Key = Hashable
Features = tuple[FeatureRow, ...]
"""All rows of one item, on the CPU."""


class Spill(Protocol):
    """Where features go that local memory has no room for."""

    def put(self, data: np.ndarray) -> Any:
        """Keep uint8 `[n]` as long as the handle that is returned."""

    def get(self, handle: Any) -> np.ndarray: ...


@dataclass
class CacheCounts:
    """What a cache did since they were last taken."""

    hits: int = 0
    """Found, spilled ones included."""
    spilled_hits: int = 0
    stored: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class _Spilled:
    handle: Any
    layout: tuple[tuple[tuple[torch.dtype, torch.Size], ...], ...]
    """Of each row and tensor, in the order of their bytes."""
    size: int


class FeatureCache:
    """Maps a key to the features of an item. Not thread-safe."""

    def __init__(self, limit: int, spill: Spill | None = None, spill_limit: int = 0) -> None:
        """`limit` bytes in local memory; `spill_limit` bytes of further ones in `spill`, if there is one."""
        self.limit, self.spill_limit = limit, spill_limit if spill is not None else 0
        self._spill = spill
        self._local: OrderedDict[Key, Features] = OrderedDict()
        self._spilled: OrderedDict[Key, _Spilled] = OrderedDict()
        self.local_bytes = self.spilled_bytes = 0
        self._counts = CacheCounts()

    def __len__(self) -> int:
        return len(self._local) + len(self._spilled)

    def get(self, key: Key) -> Features | None:
        """The features put under `key`, now the most recently used; None if there are none (any more)."""
        if key in self._local:
            self._local.move_to_end(key)
            self._counts.hits += 1
            return self._local[key]
        if key in self._spilled and self._spill is not None:
            spilled = self._spilled.pop(key)
            self.spilled_bytes -= spilled.size
            features = _unpack(self._spill.get(spilled.handle), spilled.layout)
            self._counts.hits += 1
            self._counts.spilled_hits += 1
            self._keep(key, features)
            return features
        return None

    def put(self, key: Key, features: Features) -> Features:
        """Store the features of an item; returns them, in memory of their own."""
        self._forget(key)
        self._counts.stored += 1
        own = tuple(tuple(_of_its_own(tensor) for tensor in row) for row in features)
        self._keep(key, own)
        return own

    def take_counts(self) -> CacheCounts:
        """Counts since the last call."""
        counts, self._counts = self._counts, CacheCounts()
        return counts

    def _keep(self, key: Key, features: Features) -> None:
        self._local[key] = features
        self.local_bytes += size_of(features)
        while self.local_bytes > self.limit:
            oldest, leaving = self._local.popitem(last=False)
            self.local_bytes -= size_of(leaving)
            self._give_away(oldest, leaving)

    def _give_away(self, key: Key, features: Features) -> None:
        size = size_of(features)
        if self._spill is None or size > self.spill_limit:
            self._counts.dropped += 1
            return
        while self.spilled_bytes + size > self.spill_limit:
            self.spilled_bytes -= self._spilled.popitem(last=False)[1].size
            self._counts.dropped += 1
        layout = tuple(tuple((t.dtype, t.shape) for t in row) for row in features)
        self._spilled[key] = _Spilled(self._spill.put(_pack(features)), layout, size)
        self.spilled_bytes += size

    def _forget(self, key: Key) -> None:
        if key in self._local:
            self.local_bytes -= size_of(self._local.pop(key))
        if key in self._spilled:
            self.spilled_bytes -= self._spilled.pop(key).size


def size_of(features: Features) -> int:
    return sum(tensor.nbytes for tensor in _tensors(features))


def _tensors(features: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    return (tensor for row in features for tensor in row)


def _of_its_own(tensor: Tensor) -> Tensor:
    """A row that shares memory with others of its batch would keep all of them."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _pack(features: Features) -> np.ndarray:
    """uint8 `[n]`: the bytes of all tensors end to end."""
    parts = [tensor.flatten().view(torch.uint8) for tensor in _tensors(features)]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.uint8)


def _unpack(data: np.ndarray, layout: Sequence[Sequence[tuple[torch.dtype, torch.Size]]]) -> Features:
    at = 0
    rows = []
    for row in layout:
        tensors = []
        for dtype, shape in row:
            end = at + shape.numel() * dtype.itemsize
            # Copied: an object store's arrays are read-only, and one tensor must not keep the others.
            tensors.append(torch.from_numpy(data[at:end].copy()).view(dtype).view(shape))
            at = end
        rows.append(tuple(tensors))
    return tuple(rows)
