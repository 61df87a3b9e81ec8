"""EnginePool: who serves, and who gets which group.

membership  `add`: the engines of the run, in the order of their places
routing     by slot: a place in a batch has the same engine in every rerun, and the next one with each attempt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rollout.engines.protocol import SamplingParams
from rollout.types import StoredPrompt, Together
from saccade.fleet.protocols import Engine, Reference

E = TypeVar("E", bound=Engine)


@dataclass(frozen=True)
class Request:
    """One group to be sampled."""

    prompt: StoredPrompt
    slot: int
    """Its place in a batch."""
    seed: int


class EnginePool(Generic[E]):
    """The only owner of engines."""

    def __init__(self, members: Sequence[E] = ()) -> None:
        self._members = list(members)
        self._joint_starts = 0

    @property
    def members(self) -> tuple[E, ...]:
        return tuple(self._members)

    def add(self, member: E) -> None:
        """Let `member` serve."""
        self._members.append(member)

    def sample(self, requests: Sequence[Request], sampling: SamplingParams, *, together: bool) -> list[Reference]:
        """Send each request to its engine; returns where its group will be. With `together` an engine begins when it
        has all of its requests: it then schedules them alike in every rerun, and what it computes has the same bits."""
        routes = [self._route(request) for request in requests]
        starts: dict[int, Together] = {}
        if together:
            self._joint_starts += 1
            name = str(self._joint_starts)
            starts = {member: Together(name, share) for member, share in Counter(routes).items()}
        return [
            self._members[member].sample(
                request.prompt.prompt, sampling, request.seed, request.prompt.ref.attempt, starts.get(member)
            )
            for member, request in zip(routes, requests, strict=True)
        ]

    def _route(self, request: Request) -> int:
        return (request.slot + request.prompt.ref.attempt) % len(self._members)
