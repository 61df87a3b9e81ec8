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

ASLEEP_SECONDS = 5.0
"""A limit that was overrun by more says that the driver itself was stopped meanwhile."""


def overslept(since: float, limit: float) -> bool:
    """Whether a wait of `limit` seconds, begun at `since`, says nothing: the driver did not run when it ended."""
    return time.monotonic() - since > limit + ASLEEP_SECONDS


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
        self._runs = False
        self._filling: set[int] = set()
        """Places for which an actor is made."""
        self.lost = 0
        """Members lost so far."""
        self._lost_on: Counter[str] = Counter()
        """The same by node."""
        pool.on_loss = self._replace_lost

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask the members whether they live, beside the body."""
        self._tasks, self._runs = Tasks(), True
        self._filling.clear()
        for member in self.pool.members:
            if member.state in (MemberState.DEAD, MemberState.STARTING):  # an earlier loop left it at that
                member.actor.kill()
                self._spawn_fill(member.place)
            if member.state is MemberState.DRAINING:
                self._tasks.spawn(self._drain(member))
        self._fill_missing()
        self._tasks.spawn(self._watch())
        try:
            yield
        finally:
            self._runs = False
            await self._tasks.cancel()

    def check(self) -> None:
        """Raises RunError where no member is left and none will come."""
        self._tasks.check()

    def scale(self, count: int) -> None:
        """Let there be `count` members, at the first places. More come as soon as the cluster has room for them; one
        that is too many ends when the groups that it has are done."""
        members = {member.place: member for member in self.pool.members}
        self._wanted = count
        self._fill_missing()
        for member in members.values():
            if member.place < count and member.state is MemberState.DRAINING:
                self.pool.enter(member, MemberState.SERVING)
            self._drain_if_unwanted(member)

    def _fill_missing(self) -> None:
        """Fill the places that are wanted and have no member yet."""
        for place in {*range(self._wanted)} - {member.place for member in self.pool.members}:
            self._failures[place] = 0
            self._spawn_fill(place)

    def _spawn_fill(self, place: int, pause: float = 0) -> None:
        """Fill a place, unless that goes on; `running` makes up for it where nobody is kept at the moment."""
        if self._runs and place not in self._filling:
            self._filling.add(place)
            self._tasks.spawn(self._fill(place, pause))

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
        self.pool.enter(member, MemberState.DEAD)  # a sync or a question that goes on finds it dead, and lost to nobody
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
        if pause and all(self._hopeless(m) for m in self.pool.members):
            self.pool.give_up(text := f"{member.name} failed {failures} times in a row, the last time: {how}")
            raise RunError(text)
        self._say(f"{member.name} was lost and is replaced{f' in {pause:.0f} s' if pause else ''}: {how}")
        self._spawn_fill(member.place, pause)

    def _hopeless(self, member: Member[A]) -> bool:
        away = member.state in (MemberState.DEAD, MemberState.STARTING)
        return away and self._failures[member.place] >= MOST_FAILURES

    async def _fill(self, place: int, pause: float = 0) -> None:
        await asyncio.sleep(pause)
        avoid = [node for node, count in self._lost_on.items() if node and count >= MOST_FAILURES]
        former = [member for member in self.pool.members if member.place == place]
        for dead in former:
            dead.remark = "its replacement waits for a place in the cluster"
        if (actor := await self._made(place, avoid)) is None:
            self._filling.discard(place)
            for dead in former:
                self.pool.remove(dead)
            self._leave(place)
            return
        member = Member(place, actor)
        self.pool.put(member)
        self._filling.discard(place)
        try:
            await awaited(member.actor.start(), self._start_timeout, f"{member.name} to start")
            member.node = await awaited(member.actor.node(), CALL_TIMEOUT, f"the node of {member.name}")
            await self._join(member)
        except RunError as error:
            self.pool.lose(member, str(error))
        if member.state is MemberState.SERVING:
            self._say(f"{member.name} serves")
            self._drain_if_unwanted(member)

    async def _made(self, place: int, avoid: Collection[str]) -> A | None:
        """An actor for a place; None where the place is not wanted any more before the cluster has room for it."""
        making = asyncio.ensure_future(self._create(place, avoid))
        try:
            while not making.done():
                if place >= self._wanted:
                    return None
                await asyncio.wait([making], timeout=POLL_SECONDS)
            return making.result()
        finally:
            making.cancel()

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
            if not self._excused(since) and not overslept(since, self._silence):
                self.pool.lose(member, first_lines(error))
