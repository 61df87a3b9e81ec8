"""Pools: which actors of one kind there are, in which state each is, and who gets which group.

starting ─▶ syncing ─▶ serving ─▶ draining ─▶ dead      membership: an engine as long as it lives
    └──────────┴──────────┴──────────▶ dead             (rewards and data have no weights to wait for)

place       stays when its member is replaced: rollout-1 is the member at place 1, whoever that is now
routing     apart from membership, over those that serve: by slot, so that a place in a batch has the same engine in
            every rerun and the next one with each attempt; or by load, to the engine with the fewest tokens left
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from rollout.engines.protocol import SamplingParams
from rollout.types import StoredPrompt, Together
from saccade.errors import RunError
from saccade.fleet.protocols import Actor, Engine, Reference

A = TypeVar("A", bound=Actor)
E = TypeVar("E", bound=Engine)


class MemberState(StrEnum):
    STARTING = "starting"
    SYNCING = "syncing"
    """It is ready, and waits for the current weights."""
    SERVING = "serving"
    DRAINING = "draining"
    """It gets no further groups, and ends when those that it has are done."""
    DEAD = "dead"


@dataclass(eq=False)
class Member(Generic[A]):
    """An actor from its start to its end. Who replaces it is another member."""

    place: int
    actor: A
    state: MemberState = MemberState.STARTING
    version: int = 0
    """The version of an engine's weights."""
    load: int = 0
    """Tokens of prompts and completions that the groups of an engine can come to at most."""
    groups: int = 0
    """Groups that it answered."""
    node: str = ""
    """Ray's id of its node; empty until it has started."""
    since: float = field(default_factory=time.monotonic)
    """When it came into its state, on the clock of `time.monotonic`."""
    remark: str = ""
    """Says of a dead one why it is not replaced yet."""

    @property
    def name(self) -> str:
        return self.actor.name


class Pool(Generic[A]):
    """The members of one kind, by their places. All calls come from one thread."""

    def __init__(self, actors: Iterable[A] = ()) -> None:
        """`actors` serve at the places 0, 1, ..."""
        self._members = {i: Member(i, actor, MemberState.SERVING) for i, actor in enumerate(actors)}
        self._serving = list(self._members.values())
        self._changed = asyncio.Event()
        self._given_up = ""
        """Says why nobody will serve any more."""
        self.on_loss: Callable[[Member[A], str], None] = _end
        """Told of a member that is lost, and how, in words; by default that is an error. A `Keeper` replaces it."""

    @property
    def members(self) -> tuple[Member[A], ...]:
        """All members, in the order of their places. A dead one is a member until its place is taken or given up."""
        return tuple(self._members[place] for place in sorted(self._members))

    @property
    def actors(self) -> tuple[A, ...]:
        """The actors of all members that are not dead."""
        return tuple(member.actor for member in self.members if member.state is not MemberState.DEAD)

    @property
    def serving(self) -> Sequence[Member[A]]:
        """The members that get groups, in the order of their places."""
        return self._serving

    def put(self, member: Member[A]) -> None:
        """Let `member` have its place."""
        self._members[member.place] = member
        self._update()

    def remove(self, member: Member[A]) -> None:
        """Give up the place of `member`."""
        del self._members[member.place]
        self._update()

    def enter(self, member: Member[A], state: MemberState) -> None:
        """Enter that `member` is in `state` now."""
        member.state, member.since = state, time.monotonic()
        self._update()

    def lose(self, member: Member[A], how: str) -> None:
        """Enter that `member` is dead or hangs; `how` in words. Entering it again changes nothing."""
        if member.state is not MemberState.DEAD:
            self.enter(member, MemberState.DEAD)
            self.on_loss(member, how)

    async def serves(self) -> None:
        """Wait until somebody serves. Raises RunError where nobody will."""
        while not self._serving:
            if self._given_up:
                raise RunError(self._given_up)
            await self._changed.wait()

    def give_up(self, why: str) -> None:
        """Enter that nobody will come for those who are lost."""
        self._given_up = why
        self._update()

    def describe(self) -> list[str]:
        """Return in words who does not serve."""
        now = time.monotonic()
        away = [m for m in self.members if m.state not in (MemberState.SERVING, MemberState.DRAINING)]
        return [f"{m.name} is {m.state} for {now - m.since:.0f} s{m.remark and f' ({m.remark})'}" for m in away]

    def _update(self) -> None:
        self._serving = [member for member in self.members if member.state is MemberState.SERVING]
        self._changed.set()
        self._changed = asyncio.Event()


def _end(member: Member[A], how: str) -> None:
    raise RunError(f"{member.name} died: {how}")


@dataclass(frozen=True)
class Request:
    """One group to be sampled."""

    prompt: StoredPrompt
    slot: int
    """Its place in a batch."""
    seed: int


@dataclass(eq=False)
class Sent(Generic[E]):
    """A request that is with an engine."""

    member: Member[E]
    group: Reference
    """Where the group will be."""
    tokens: int
    """Its part of the load of its engine; 0 when it has ended."""


class EnginePool(Pool[E]):
    """The engines of a run."""

    def __init__(self, engines: Iterable[E] = (), *, by_load: bool = False) -> None:
        super().__init__(engines)
        self._by_load = by_load
        self._joint_starts = 0

    def sample(self, requests: Sequence[Request], sampling: SamplingParams, *, together: bool) -> list[Sent[E]]:
        """Send each request to an engine that serves, of which there must be one. With `together` an engine begins when
        it has all of its requests: it then schedules them alike in every rerun, and what it computes has the same
        bits."""
        routed = [(request, self._route(request, sampling)) for request in requests]
        starts: dict[int, Together] = {}
        if together:
            self._joint_starts += 1
            name = str(self._joint_starts)
            shares = Counter(sent.place for _, (sent, _) in routed)
            starts = {place: Together(name, share) for place, share in shares.items()}
        return [
            Sent(
                member,
                member.actor.sample(
                    request.prompt.prompt,
                    sampling,
                    request.seed,
                    request.prompt.ref.attempt,
                    starts.get(member.place),
                ),
                tokens,
            )
            for request, (member, tokens) in routed
        ]

    def ended(self, sent: Sent[E]) -> None:
        """Take what was sent off the load of its engine: it was answered, or nobody waits for it any more."""
        sent.member.load -= sent.tokens
        sent.tokens = 0

    def _route(self, request: Request, sampling: SamplingParams) -> tuple[Member[E], int]:
        """The engine of a request, and what the request adds to its load."""
        tokens = request.prompt.length + sampling.n * sampling.max_tokens
        if self._by_load:
            member = min(self._serving, key=lambda m: m.load)
        else:
            member = self._serving[(request.slot + request.prompt.ref.attempt) % len(self._serving)]
        member.load += tokens
        return member, tokens
