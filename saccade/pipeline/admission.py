"""Admission: which batches may be generated now. A policy reads the buffer and a version, and never talks to an actor.

Batch b is trained at policy version b. It may be admitted once the engines hold version b - max_staleness, so that
admission alone bounds how old a token is; `checked_lag` asserts it at use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.types import GroupSummary
from saccade.pipeline.groups import GroupBuffer


class Admission(Protocol):
    @property
    def together(self) -> bool:
        """Whether an engine begins a batch when it has all of its groups, so that a rerun repeats it bit for bit."""
        ...

    def due(self, groups: GroupBuffer, version: int) -> Iterable[int]:
        """The batches to admit now, in order, where the engines hold `version`."""
        ...


@dataclass(frozen=True)
class Strict:
    """A batch consists of the groups that were admitted for it, in their order, whichever ends first: a rerun with the
    same seed trains the same batches."""

    max_staleness: int
    batches: int
    """Number of batches in the run, one for each step."""

    @property
    def together(self) -> bool:
        return self.max_staleness == 0

    def due(self, groups: GroupBuffer, version: int) -> range:
        return range(groups.next_batch, min(version + self.max_staleness + 1, self.batches))


def checked_lag(summaries: Sequence[GroupSummary], version: int, max_staleness: int) -> int:
    """Largest lag of a token behind `version`. Raises AssertionError when admission let an older one through."""
    oldest = min(summaries, key=lambda s: s.oldest_version)
    lag = version - oldest.oldest_version
    if not 0 <= lag <= max_staleness:
        raise AssertionError(
            f"group {oldest.ref} was sampled by version {oldest.oldest_version}, to be trained at version {version}: "
            f"its lag is {lag}; it must be between 0 and {max_staleness}"
        )
    return lag
