"""Keeper: replaces the members of a pool that died or hang, while the run goes on.

    a group or a sync fails ─┐
    no answer to a question ─┴▶ lose ─▶ kill ─▶ create (waits for its place) ─▶ start ─▶ join ─▶ serving

Whoever had groups with the lost member is told at once: an answer that is awaited from a killed actor is an error.
`scale` changes how many members there are: more are created in the same way, and one too many is drained.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

from saccade.errors import RunError
from saccade.fleet.pool import Member, MemberState, Pool
from saccade.fleet.protocols import Actor
from saccade.fleet.tasks import Tasks
from saccade.fleet.waiting import CALL_TIMEOUT, POLL_SECONDS, awaited, first_lines

A = TypeVar("A", bound=Actor)

MOST_FAILURES = 3
"""Deaths in a row at one place, none of them after a group was answered, before it is left alone for a while; and
deaths on one node before others are preferred."""
PAUSE_SECONDS = 60.0
"""Seconds for which such a place is left alone, and that again for each further death."""
QUESTIONS = 6
"""Questions to each member in the time after which silence is death."""


class Keeper(Generic[A]):
    def __init__(
        self,
        pool: Pool[A],
        create: Callable[[int, Collection[str]], Awaitable[A]],
        *,
        start_timeout: float,
        silence: float,
        say: Callable[[str], None],
        join: Callable[[Member[A]], Awaitable[None]] | None = None,
        leave: Callable[[int], None] = lambda place: None,
        excused: Callable[[float], bool] = lambda since: False,
    ) -> None:
        """
        Args:
            create: makes an actor for a place, away from some nodes; waits for as long as the cluster has none.
            start_timeout: seconds in which an actor must start.
            silence: seconds without an answer after which a member counts as hung.
            join: lets a member that has started serve; by default it serves at once.
            leave: called where a place is not wanted any more.
            excused: whether silence since this time (`time.monotonic`) says nothing.
        """
        self.pool, self._create, self._say = pool, create, say
        self._start_timeout, self._silence = start_timeout, silence
        self._join, self._excused = join or self._serve, excused
        self._leave = leave
        self._wanted = len(pool.members)
        self._failures: Counter[int] = Counter()
        self._tasks = Tasks()
        self.lost = 0
        """Members lost so far."""
        self._lost_on: Counter[str] = Counter()
        """The same by node."""
        pool.on_loss = self._replace_lost

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask the members whether they live, beside the body."""
        self._tasks = Tasks()
        for member in self.pool.members:
            if member.state in (MemberState.DEAD, MemberState.STARTING):  # an earlier loop left it at that
                member.actor.kill()
                self._tasks.spawn(self._fill(member.place))
            if member.state is MemberState.DRAINING:
                self._tasks.spawn(self._drain(member))
        self._tasks.spawn(self._watch())
        try:
            yield
        finally:
            await self._tasks.cancel()

    def check(self) -> None:
        """Raises RunError where no member is left and none will come."""
        self._tasks.check()

    def scale(self, count: int) -> None:
        """Let there be `count` members, at the first places. More come as soon as the cluster has room for them; one
        that is too many ends when the groups that it has are done."""
        members = {member.place: member for member in self.pool.members}
        self._wanted = count
        for place in range(count):
            if place not in members:
                self._failures[place] = 0
                self._tasks.spawn(self._fill(place))
            elif members[place].state is MemberState.DRAINING:
                self.pool.enter(members[place], MemberState.SERVING)
        for member in members.values():
            self._drain_if_unwanted(member)

    def _drain_if_unwanted(self, member: Member[A]) -> None:
        if member.place >= self._wanted and member.state is MemberState.SERVING:
            self.pool.enter(member, MemberState.DRAINING)
            self._tasks.spawn(self._drain(member))

    async def _drain(self, member: Member[A]) -> None:
        while member.load and member.state is MemberState.DRAINING:
            await asyncio.sleep(POLL_SECONDS)
        if member.state is MemberState.DRAINING:
            self._end(member, "its groups are done")

    def _end(self, member: Member[A], why: str) -> None:
        """Let a member go whose place is not wanted any more."""
        member.actor.kill()
        self.pool.remove(member)
        self._leave(member.place)
        self._say(f"{member.name} has left: {why}")

    def _replace_lost(self, member: Member[A], how: str) -> None:
        member.actor.kill()
        self.lost += 1
        self._lost_on[member.node] += 1
        if member.place >= self._wanted:
            self._end(member, how)
            return
        self._failures[member.place] = 0 if member.groups else self._failures[member.place] + 1
        failures = self._failures[member.place]
        pause = max(0, failures - MOST_FAILURES + 1) * PAUSE_SECONDS
        if pause and all(self._failures[m.place] >= MOST_FAILURES for m in self.pool.members):
            raise RunError(f"{member.name} failed {failures} times in a row, the last time: {how}")
        self._say(f"{member.name} was lost and is replaced{f' in {pause:.0f} s' if pause else ''}: {how}")
        self._tasks.spawn(self._fill(member.place, pause))

    async def _fill(self, place: int, pause: float = 0) -> None:
        await asyncio.sleep(pause)
        avoid = [node for node, count in self._lost_on.items() if node and count >= MOST_FAILURES]
        for dead in self.pool.members:
            if dead.place == place:
                dead.remark = "its replacement waits for a place in the cluster"
        member = Member(place, await self._create(place, avoid))
        self.pool.put(member)
        try:
            await awaited(member.actor.start(), self._start_timeout, f"{member.name} to start")
            member.node = await awaited(member.actor.node(), CALL_TIMEOUT, f"the node of {member.name}")
            await self._join(member)
        except RunError as error:
            self.pool.lose(member, str(error))
        if member.state is MemberState.SERVING:
            self._say(f"{member.name} serves")
            self._drain_if_unwanted(member)

    async def _serve(self, member: Member[A]) -> None:
        self.pool.enter(member, MemberState.SERVING)

    async def _watch(self) -> None:
        for member in self.pool.members:
            if not member.node:
                with suppress(RunError):
                    member.node = await awaited(member.actor.node(), self._silence, "its node")
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
