"""Dispatcher: takes an issued prompt to a group that is scored or given up. Training and evaluation both use it.

start   EnginePool.sample ─▶ Rewards.score ─▶ (verdicts, GroupSummary)     chained by reference
follow  waits for the summary; what failed and may succeed is attempted again, by another engine if there is one;
        an engine that died is lost to its pool, and its groups are sent to others
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rollout.engines.protocol import SamplingParams
from rollout.types import GroupSummary, PromptRef, RolloutFailure, StoredGroup, StoredPrompt, draw_seed
from saccade.errors import RunError
from saccade.fleet.pool import EnginePool, Pool, Request
from saccade.fleet.waiting import POLL_SECONDS, answer, first_lines
from saccade.pipeline.groups import DropReason, Group, GroupBuffer, State

SUSPECT = 2
"""Engines and reward actors that may die while they have a group, before it is tried apart from others like it."""
MOST_DEATHS = 4
"""Engines and reward actors that may die while they have a group, before its prompt is taken for what kills them."""


@dataclass
class Dispatcher:
    pool: EnginePool[Any]
    rewards: Pool[Any]
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
    read: Callable[[Sequence[PromptRef]], Awaitable[Sequence[StoredPrompt]]] | None = None
    """Reads prompts again whose contents left the object store with their node."""
    groups: GroupBuffer = field(default_factory=GroupBuffer)
    """The ledger that each transition is entered into."""
    _apart: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one suspect that is with an engine."""

    @property
    def patience(self) -> float:
        """Longest silence before a wait itself is an error: the actors' own limits, and a margin for transport. Groups
        are scored together, then perhaps one by one."""
        return self.group_timeout + 2 * self.reward_timeout + 60.0

    def start(self, groups: Sequence[Group], version: int = 0, *, together: bool = False) -> None:
        """Send groups that were issued to engines, which hold `version`, with their rewards chained behind. Where no
        engine or no reward actor serves, `follow` sends them once one does."""
        if not self.pool.serving or not self.rewards.serving:
            return
        requests = [
            Request(group.prompt, group.slot, draw_seed(self.run_seed, group.ref.uid, group.ref.epoch))
            for group in groups
        ]
        for group, sent in zip(groups, self.pool.sample(requests, self.sampling, together=together), strict=True):
            group.sent, group.version = sent, version
            self._score(group)

    def _score(self, group: Group) -> None:
        """Chain the rewards behind a group that was sent."""
        assert group.sent is not None
        serving = self.rewards.serving
        group.scorer = serving[group.slot % len(serving)]
        verdicts, group.pending = group.scorer.actor.score(group.sent.group)
        group.stored = StoredGroup(group.sent.group, verdicts) if self.keep else None

    async def follow(self, group: Group, version: Callable[[], int] = lambda: 0) -> None:
        """Wait until `group`, which was started, is scored or given up. `version` says what the engines hold."""
        failures = 0
        try:
            while group.state is State.ISSUED:
                # An engine takes all its groups with it: only one at a time of those that were with several may be
                # what kills them, so that no other is taken for it.
                async with self._apart if group.deaths >= SUSPECT else nullcontext():
                    if group.pending is None:
                        await self._send(group, version)
                    if (summary := await self._outcome(group)) is None:
                        continue
                group.summary, failure = summary, summary.failure
                if failure is None:
                    self.groups.score(group)
                elif failure.engine_dead:
                    self._bereave(group, failure)
                else:
                    failures += 1
                    if not failure.retryable or failures >= self.max_attempts:
                        self.groups.drop(group.ref, DropReason.FAILED, failure.reason)
                    else:
                        await self._try_again(group)
        finally:
            if group.sent is not None:
                self.pool.ended(group.sent)
            if not self.keep:
                group.sent = None  # it has the reference of what was sampled

    async def _send(self, group: Group, version: Callable[[], int]) -> None:
        """Send a group, or what was sampled of it to the rewards, as soon as somebody serves."""
        while group.pending is None:
            await self.pool.serves()
            await self.rewards.serves()
            if group.sent is None:
                self.start([group], version())
            elif self.rewards.serving:
                self._score(group)

    async def _outcome(self, group: Group) -> GroupSummary | None:
        """How an attempt ended; None where it goes on, with another reward actor."""
        assert group.pending is not None
        assert group.sent is not None
        assert group.scorer is not None
        member, call = group.sent.member, group.pending
        try:
            summary = await answer(call)
        except Exception as error:
            reason, dead = first_lines(error, 1), getattr(error, "actor_id", None)
            if dead == group.scorer.actor.id:
                self.rewards.lose(group.scorer, reason)
                self._count_death(group, reason)
                return None
            of_engine = dead == member.actor.id
            failure = RolloutFailure(group.ref, reason, member.name, engine_dead=of_engine, retryable=True)
            return GroupSummary.of_failure(failure)
        finally:
            group.pending = None
        group.scorer.groups += 1
        if summary.failure is None:
            member.groups += 1
        return summary

    def _bereave(self, group: Group, failure: RolloutFailure) -> None:
        """Go on with a group whose engine died: with another engine, unless it killed too many."""
        assert group.sent is not None
        self.pool.ended(group.sent)
        self.pool.lose(group.sent.member, failure.reason)
        self._count_death(group, failure.reason)
        if group.state is State.ISSUED:
            self._reset(group)

    def _count_death(self, group: Group, reason: str) -> None:
        """Note that an engine or a reward actor died that had `group`; too often, and it is not tried again."""
        group.deaths += 1
        if group.deaths >= MOST_DEATHS:
            detail = f"{group.deaths} engines or reward actors died of it, the last: {reason}"
            self.groups.quarantine(group.ref, detail)

    async def _try_again(self, group: Group) -> None:
        """Prepare the next attempt. What the prompt refers to may have left the object store with its node."""
        assert group.sent is not None
        self.pool.ended(group.sent)
        if self.read is not None:
            (group.prompt,) = await self.read([group.ref])
        self._reset(group)

    def _reset(self, group: Group) -> None:
        self.groups.retry(group)
        group.sent = None

    async def finish(self, groups: Sequence[Group], what: str) -> list[GroupSummary]:
        """Wait until each of `groups` is scored or given up, and return their summaries. `what` they are, for the user.

        Raises RunError when nothing ended in time, or nobody is left who could do it."""
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
        away = [*self.pool.describe(), *self.rewards.describe()]
        text = f"waited {self.patience:g} s for {len(waiting)} {what}{first if waiting else ''}"
        raise RunError("; ".join([text, *away]))
