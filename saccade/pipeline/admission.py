"""Admission: which places of which batches may be given to prompts now, and which groups make up the batch of a step.
A policy reads the buffer and a version, and never talks to an actor.

Places of batch b go to prompts once the engines hold version b - max_staleness; each step takes B groups. So at version
v there are (v + max_staleness + 1) x B places, of which the steps took v x B.

    Strict     step t trains the groups of batch t, and no other. Its places are given away at version t - max_staleness
               or later, so no token is older than that: admission alone bounds the lag.
    Windowed   step t trains B groups of those that are scored, whichever batch they were admitted for. A group may be
               overtaken; what is too old when a batch is sealed is dropped, and its prompt issued again.

`checked_lag` asserts the bound for both where a batch is used, from the version of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.config import RolloutConfig
from rollout.types import GroupSummary
from saccade.pipeline.groups import Group, GroupBuffer, State


class Admission(Protocol):
    @property
    def together(self) -> bool:
        """Whether an engine begins a batch when it has all of its groups, so that a rerun repeats it bit for bit."""
        ...

    @property
    def refills_places(self) -> bool:
        """Whether the place of a group that was given up goes to another prompt at once."""
        ...

    def due(self, groups: GroupBuffer, version: int) -> range:
        """The batches to admit now, in order, where the engines hold `version`."""
        ...

    def stale(self, groups: GroupBuffer, step: int) -> list[Group]:
        """The scored groups that are too old for the update `step`."""
        ...

    def ready(self, groups: GroupBuffer, step: int) -> list[Group] | None:
        """The scored groups of the update `step`, in the order of their places; None where it has to wait."""
        ...


@dataclass(frozen=True)
class _Places:
    max_staleness: int
    batches: int
    """Number of batches in the run, one for each step."""

    def due(self, groups: GroupBuffer, version: int) -> range:
        return range(groups.next_batch, min(version + self.max_staleness + 1, self.batches))


@dataclass(frozen=True)
class Strict(_Places):
    """A batch consists of the groups that were admitted for it, in their order, whichever ends first: a rerun with the
    same seed trains the same batches."""

    refills_places = False

    @property
    def together(self) -> bool:
        return self.max_staleness == 0

    def stale(self, groups: GroupBuffer, step: int) -> list[Group]:
        return []

    def ready(self, groups: GroupBuffer, step: int) -> list[Group] | None:
        found = groups.of(step)
        waits = step >= groups.next_batch or any(g.state is State.ISSUED for g in found)
        return None if waits else found


@dataclass(frozen=True)
class Windowed(_Places):
    """A batch consists of the first groups that are scored, so that a long completion holds nobody up.

    A prompt that was dropped as too stale is `late` at its next attempt, and is overtaken no further: a batch is sealed
    only if all late groups can still be trained within the bound, `size` at each step, the earliest bound first."""

    size: int
    """B, groups in a batch."""

    together = False
    refills_places = True

    def stale(self, groups: GroupBuffer, step: int) -> list[Group]:
        return [g for g in groups.scored() if step - _oldest(g) > self.max_staleness]

    def ready(self, groups: GroupBuffer, step: int) -> list[Group] | None:
        if len(scored := groups.scored()) < self.size:
            return None
        # Late groups first, then what would be too old soonest, then what has waited longest.
        chosen = sorted(scored, key=lambda g: (not g.late, _oldest(g), g.since))[: self.size]
        late = [g for g in groups.unsealed() if g.late and g.batch < groups.next_batch and g not in chosen]
        bounds = sorted(g.version + self.max_staleness for g in late)
        behind = any(step + 1 + i // self.size > bound for i, bound in enumerate(bounds))
        if behind and any(g.state is State.ISSUED for g in late):
            return None
        return sorted(chosen, key=lambda g: (g.batch, g.slot))


def make_admission(rollout: RolloutConfig, steps: int, size: int) -> Admission:
    """The policy of a run of so many steps, each of them with `size` groups."""
    if rollout.windowed:
        return Windowed(rollout.max_staleness, steps, size)
    return Strict(rollout.max_staleness, steps)


def _oldest(group: Group) -> int:
    """The oldest version of a token of a scored group."""
    assert group.summary is not None
    return group.summary.oldest_version


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
