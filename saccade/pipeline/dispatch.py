"""Dispatcher: takes an issued prompt to a group that is scored or given up. Training and evaluation both use it.

start   EnginePool.sample ─▶ Rewards.score ─▶ (verdicts, GroupSummary)     chained by reference
follow  waits for the summary; what failed and may succeed is attempted again, by another engine if there is one
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rollout.engines.protocol import SamplingParams
from rollout.types import GroupSummary, StoredGroup, draw_seed
from saccade.errors import RunError
from saccade.fleet.pool import EnginePool, Request
from saccade.fleet.protocols import Rewards
from saccade.fleet.waiting import POLL_SECONDS, answer, first_lines
from saccade.pipeline.groups import DropReason, Group, GroupBuffer


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

    def start(self, groups: Sequence[Group], version: int = 0, *, together: bool = False) -> None:
        """Send groups that were issued to engines, which hold `version`, with their rewards chained behind."""
        requests = [
            Request(group.prompt, group.slot, draw_seed(self.run_seed, group.ref.uid, group.ref.epoch))
            for group in groups
        ]
        sampled = self.pool.sample(requests, self.sampling, together=together)
        for group, reference in zip(groups, sampled, strict=True):
            verdicts, group.pending = self.rewards[group.slot % len(self.rewards)].score(reference)
            group.stored = StoredGroup(reference, verdicts) if self.keep else None
            group.version = version

    async def follow(self, group: Group, version: Callable[[], int] = lambda: 0) -> None:
        """Wait until `group`, which was started, is scored or dropped. `version` says what the engines hold.

        Raises RunError when an engine or an actor died."""
        failures = 0
        while group.pending is not None:
            try:
                group.summary = await answer(group.pending)
            except Exception as error:
                raise RunError(f"a group was lost with its actor: {first_lines(error, 1)}") from error
            group.pending, failure = None, group.summary.failure
            if failure is None:
                self.groups.score(group)
                return
            if failure.engine_dead:
                raise RunError(f"engine {failure.engine} died while generating {failure.ref}: {failure.reason}")
            failures += 1
            if not failure.retryable or failures >= self.max_attempts:
                self.groups.drop(group.ref, DropReason.FAILED, failure.reason)
                return
            self.groups.retry(group)
            self.start([group], version())

    async def finish(self, groups: Sequence[Group], what: str) -> list[GroupSummary]:
        """Wait until each of `groups` is scored or dropped, and return their summaries. `what` they are, for the user.

        Raises RunError when an engine or an actor died, or nothing ended in time."""
        waiting = {asyncio.create_task(self.follow(group)): group for group in groups}
        progress = time.monotonic()
        try:
            while waiting:
                self.check_stop()
                done, _ = await asyncio.wait(waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del waiting[task]
                    task.result()
                    progress = time.monotonic()
                if time.monotonic() - progress > self.patience:
                    self.end_silence(list(waiting.values()), f"of {len(groups)} {what}")
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return [group.summary for group in groups if group.summary is not None]

    def end_silence(self, waiting: Sequence[Group], what: str) -> NoReturn:
        """Raises RunError: for `patience` seconds nothing began or ended, and `waiting` is awaited."""
        names = ", ".join(str(group.ref) for group in waiting[:3])
        first = f" (first: {names}); raise cluster.timeout (a third of it) if completions take that long"
        raise RunError(f"waited {self.patience:g} s for {len(waiting)} {what}{first if waiting else ''}")
