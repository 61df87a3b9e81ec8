"""Keeper: replaces the members of a pool that died or hang, while the run goes on.

    a group or a sync fails ─┐
    no answer to a question ─┴▶ lose ─▶ kill ─▶ create (waits for its place) ─▶ start ─▶ join ─▶ serving

Whoever had groups with the lost member is told at once: an answer that is awaited from a killed actor is an error.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from saccade.errors import RunError
from saccade.fleet.pool import Member, MemberState, Pool
from saccade.fleet.protocols import Actor
from saccade.fleet.tasks import Tasks
from saccade.fleet.waiting import CALL_TIMEOUT, awaited, first_lines

A = TypeVar("A", bound=Actor)

MOST_FAILURES = 3
"""Deaths in a row at one place, none of them after a group was answered, before the place is given up."""
QUESTIONS = 6
"""Questions to each member in the time after which silence is death."""


class Keeper(Generic[A]):
    def __init__(
        self,
        pool: Pool[A],
        create: Callable[[Member[A]], Awaitable[A]],
        *,
        start_timeout: float,
        silence: float,
        say: Callable[[str], None],
        join: Callable[[Member[A]], Awaitable[None]] | None = None,
        excused: Callable[[float], bool] = lambda since: False,
    ) -> None:
        """
        Args:
            create: makes an actor at the place of a dead member; waits for as long as the cluster has none.
            start_timeout: seconds in which an actor must start.
            silence: seconds without an answer after which a member counts as hung.
            join: lets a member that has started serve; by default it serves at once.
            excused: whether silence since this time (`time.monotonic`) says nothing.
        """
        self.pool, self._create, self._say = pool, create, say
        self._start_timeout, self._silence = start_timeout, silence
        self._join, self._excused = join or self._serve, excused
        self._failures: Counter[int] = Counter()
        self._tasks = Tasks()
        self.lost = 0
        """Members lost so far."""
        pool.on_loss = self._replace_lost

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask the members whether they live, beside the body."""
        self._tasks = Tasks()
        for member in self.pool.members:
            if member.state in (MemberState.DEAD, MemberState.STARTING):  # an earlier loop left it at that
                member.actor.kill()
                self._tasks.spawn(self._replace(member))
        self._tasks.spawn(self._watch())
        try:
            yield
        finally:
            await self._tasks.cancel()

    def check(self) -> None:
        """Raises RunError where no member is left and none will come."""
        self._tasks.check()

    def _replace_lost(self, member: Member[A], how: str) -> None:
        member.actor.kill()
        self.lost += 1
        self._failures[member.place] = 0 if member.groups else self._failures[member.place] + 1
        if self._failures[member.place] >= MOST_FAILURES:
            self._give_up(member, how)
            return
        self._say(f"{member.name} was lost and is replaced: {how}")
        self._tasks.spawn(self._replace(member))

    def _give_up(self, member: Member[A], how: str) -> None:
        self.pool.remove(member)
        text = f"{member.name} failed {MOST_FAILURES} times in a row, the last time: {how}"
        if not self.pool.members:
            raise RunError(text)
        self._say(f"{text}; the run goes on with {len(self.pool.members)} of its kind")

    async def _replace(self, dead: Member[A]) -> None:
        member = Member(dead.place, await self._create(dead))
        self.pool.put(member)
        try:
            await awaited(member.actor.start(), self._start_timeout, f"{member.name} to start")
            member.node = await awaited(member.actor.node(), CALL_TIMEOUT, f"the node of {member.name}")
            await self._join(member)
        except RunError as error:
            self.pool.lose(member, str(error))
        if member.state is MemberState.SERVING:
            self._say(f"{member.name} serves again")

    async def _serve(self, member: Member[A]) -> None:
        self.pool.enter(member, MemberState.SERVING)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._silence / QUESTIONS)
            working = (MemberState.SERVING, MemberState.DRAINING)
            await asyncio.gather(*(self._ask(m) for m in self.pool.members if m.state in working))

    async def _ask(self, member: Member[A]) -> None:
        since = time.monotonic()
        try:
            await awaited(member.actor.check_health(), self._silence, f"a sign of life of {member.name}")
        except RunError as error:
            if not self._excused(since):
                self.pool.lose(member, first_lines(error))
