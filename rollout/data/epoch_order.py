"""The order in which an epoch visits the rows. It is shuffled by seed and epoch, and never held in memory as a whole.

    blocks, shuffled ──▶ windows of about 256 MiB ──▶ rows of a window, shuffled

Only the blocks of one window are in memory at a time. Data smaller than a window are shuffled uniformly.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class _Plan:
    """One epoch: the blocks of each window, and the position at which each window starts."""

    windows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]


class EpochOrder:
    """`row(epoch, position)` is a permutation of all rows for each epoch. It is a pure function of seed and block
    sizes."""

    def __init__(self, rows: Sequence[int], nbytes: Sequence[int], *, seed: int, shuffle: bool, window_bytes: int):
        """Take `rows` and `nbytes` of each block, in file order."""
        self._rows, self._nbytes = tuple(rows), tuple(nbytes)
        self._first = np.concatenate([[0], np.cumsum(self._rows, dtype=np.int64)])
        self._seed, self._shuffle, self._window_bytes = seed, shuffle, window_bytes
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def __len__(self) -> int:
        return int(self._first[-1])

    def row(self, epoch: int, position: int) -> int:
        """Return the row at `position` (0 to the number of rows - 1) of epoch `epoch`."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside of an epoch of {len(self)} rows")
        if not self._shuffle:
            return position
        plan = self._plan(epoch)
        window = bisect_right(plan.starts, position) - 1
        return int(self._window(epoch, window)[position - plan.starts[window]])

    def fingerprint(self) -> str:
        """Return a fingerprint. Two are equal exactly if the order of every epoch is equal."""
        layout = (self._rows, self._nbytes, self._window_bytes, self._seed) if self._shuffle else len(self)
        return hashlib.sha256(repr(layout).encode()).hexdigest()[:16]

    def _generator(self, *which: int) -> np.random.Generator:
        text = "/".join(map(str, (self._seed, *which)))
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little"))

    def _make_plan(self, epoch: int) -> _Plan:
        windows: list[tuple[int, ...]] = []
        starts: list[int] = []
        current: list[int] = []
        size = position = 0
        for block in self._generator(epoch).permutation(len(self._rows)).tolist():
            if current and size + self._nbytes[block] > self._window_bytes:
                windows.append(tuple(current))
                current, size = [], 0
            if not current:
                starts.append(position)
            current.append(block)
            size, position = size + self._nbytes[block], position + self._rows[block]
        windows.append(tuple(current))
        return _Plan(tuple(windows), tuple(starts))

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        blocks = self._plan(epoch).windows[window]
        rows = np.concatenate([np.arange(self._first[b], self._first[b + 1]) for b in blocks])
        return self._generator(epoch, window).permutation(rows)
