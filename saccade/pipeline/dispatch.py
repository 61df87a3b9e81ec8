"""Dispatcher: takes an issued prompt to a group that is scored or given up. Training and evaluation both use it.

start   EnginePool.sample ─▶ Rewards.score ─▶ (verdicts, GroupSummary)     chained by reference
finish  waits for the summaries; what failed and may succeed is attempted again, by another engine if there is one
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from rollout.engines.protocol import SamplingParams
from rollout.types import GroupSummary, StoredGroup, draw_seed
from saccade.errors import RunError
from saccade.fleet.pool import EnginePool, Request
from saccade.fleet.protocols import Rewards
from saccade.fleet.waiting import POLL_SECONDS, first_lines
from saccade.pipeline.groups import Group, GroupBuffer


@dataclass
class Dispatcher:
    pool: EnginePool[Any]
    rewards: Sequence[Rewards]
    sampling: SamplingParams
    run_seed: int
    group_timeout: float
    """Seconds that an engine may take for a group."""
    reward_timeout: float
    """Seconds that the rewards may take for a group."""
    keep: bool = True
    """Whether groups stay in the object store for an update, or leave it when they are scored."""
    max_attempts: int = 3
    """Attempts at one group before it is given up and entered in the ledger with its reason."""
    check_stop: Callable[[], None] = lambda: None
    """Raises RunStopped when the user asked to stop; called while waiting."""
    groups: GroupBuffer = field(default_factory=GroupBuffer)
    """The ledger that each transition is entered into."""

    @property
    def patience(self) -> float:
        """Longest silence before a wait itself is an error: the actors' own limits, and a margin for transport. Groups
        are scored together, then perhaps one by one."""
        return self.group_timeout + 2 * self.reward_timeout + 60.0

    def start(self, groups: Sequence[Group], *, together: bool = False) -> None:
        """Send groups that were issued to engines, with their rewards chained behind."""
        requests = [
            Request(group.prompt, group.slot, draw_seed(self.run_seed, group.ref.uid, group.ref.epoch))
            for group in groups
        ]
        sampled = self.pool.sample(requests, self.sampling, together=together)
        for group, reference in zip(groups, sampled, strict=True):
            verdicts, group.pending = self.rewards[group.slot % len(self.rewards)].score(reference)
            group.stored = StoredGroup(reference, verdicts) if self.keep else None

    def finish(self, groups: Sequence[Group], what: str) -> None:
        """Wait until each of `groups` is scored or dropped. `what` they are, for the user.

        Raises RunError when an engine or an actor died, or nothing ended in time."""
        pending = {group.pending: group for group in groups if group.pending is not None}
        deadline = time.monotonic() + self.patience
        while pending:
            self.check_stop()
            done, _ = wait(pending, POLL_SECONDS)
            for call in [call for call in pending if call in done]:
                group = pending.pop(call)
                self._settle(group, call)
                if group.pending is not None:
                    pending[group.pending] = group
            if done:
                deadline = time.monotonic() + self.patience
            elif pending and time.monotonic() > deadline:
                names = ", ".join(str(group.ref) for group in list(pending.values())[:3])
                raise RunError(
                    f"waited {self.patience:g} s for {len(pending)} of {len(groups)} {what} (first: {names}); raise "
                    "cluster.timeout (a third of it) if completions take that long"
                )

    def _settle(self, group: Group, call: Future[GroupSummary]) -> None:
        """Enter how an attempt ended; start the next one where that may help."""
        if (error := call.exception()) is not None:
            raise RunError(f"a group was lost with its actor: {first_lines(error, 1)}") from error
        group.pending, group.summary = None, call.result()
        failure = group.summary.failure
        if failure is None:
            self.groups.score(group)
        elif failure.engine_dead:
            raise RunError(f"engine {failure.engine} died while generating {failure.ref}: {failure.reason}")
        elif failure.retryable and group.ref.attempt + 1 < self.max_attempts:
            self.groups.retry(group)
            self.start([group])
        else:
            self.groups.drop(group.ref, failure.reason)
