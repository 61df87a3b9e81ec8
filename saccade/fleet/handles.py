"""Handles of actors: the Protocols of `protocols.py` over Ray. That of an engine is in `rollout/handle.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rollout.data.actor import DataActorReport
from rollout.handle import RayHandle
from rollout.types import GroupSummary, PromptRef, StoredPrompt
from saccade.fleet.protocols import Reference

HEALTH = "health"
"""The group of calls that an actor answers while it works on others."""


@dataclass(frozen=True)
class RayWorkerHandle(RayHandle):
    """An actor that does one thing at a time, and answers meanwhile whether it lives."""

    def check_health(self) -> Future[None]:
        call = self.actor.check_health.options(concurrency_group=HEALTH)
        answer: Future[None] = call.remote().future()
        return answer


@dataclass(frozen=True)
class RayRewards(RayWorkerHandle):
    """A RewardActor."""

    def score(self, group: Reference) -> tuple[Reference, Future[GroupSummary]]:
        verdicts, summary = self.actor.score.remote(group)
        return verdicts, summary.future()

    def set_service(self, name: str, service: Any) -> None:
        """Let rewards call upon `service` from now on under this name."""
        self.actor.set_service.options(concurrency_group=HEALTH).remote(name, service)


@dataclass(frozen=True)
class RayData(RayWorkerHandle):
    """The DataActor."""

    def take(self, n: int) -> Future[tuple[list[StoredPrompt], dict[str, Any]]]:
        call: Future[tuple[list[StoredPrompt], dict[str, Any]]] = self.actor.take.remote(n).future()
        return call

    def read(self, refs: Sequence[PromptRef]) -> Future[list[StoredPrompt]]:
        call: Future[list[StoredPrompt]] = self.actor.read.remote(list(refs)).future()
        return call

    def held_out(self, limit: int | None, group_by: str | None) -> Future[list[tuple[StoredPrompt, str]]]:
        call: Future[list[tuple[StoredPrompt, str]]] = self.actor.held_out.remote(limit, group_by).future()
        return call

    def load_state(self, state: Mapping[str, Any] | None) -> Future[None]:
        call: Future[None] = self.actor.load_state.remote(state).future()
        return call

    def report(self) -> Future[DataActorReport]:
        call: Future[DataActorReport] = self.actor.report.remote().future()
        return call
