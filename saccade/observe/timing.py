"""Measure the wall time of the phases of a step. Time outside all phases is the driver's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures phases, which do not overlap. `seconds()` adds `driver` (the rest) and `total`."""

    def __init__(self, enter: Callable[[str], None] = lambda phase: None) -> None:
        """`enter` is told the name of each phase that begins."""
        self._enter = enter
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._enter(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {**self._phases, "driver": total - sum(self._phases.values()), "total": total}


def union_seconds(spans: list[tuple[float, float]]) -> float:
    """Return the total length of the union of time intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
