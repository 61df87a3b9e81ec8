"""Handles of actors: the Protocols of `protocols.py` over Ray. That of an engine is `rollout.actor.RayEngineHandle`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rollout.data.actor import DataActorReport
from rollout.types import GroupSummary, PromptRef, StoredPrompt
from saccade.fleet.protocols import Reference


@dataclass(frozen=True)
class RayRewards:
    """A RewardActor."""

    actor: Any

    def score(self, group: Reference) -> tuple[Reference, Future[GroupSummary]]:
        verdicts, summary = self.actor.score.remote(group)
        return verdicts, summary.future()


@dataclass(frozen=True)
class RayData:
    """The DataActor."""

    actor: Any

    def take(self, n: int) -> Future[list[StoredPrompt]]:
        call: Future[list[StoredPrompt]] = self.actor.take.remote(n).future()
        return call

    def read(self, refs: Sequence[PromptRef]) -> Future[list[StoredPrompt]]:
        call: Future[list[StoredPrompt]] = self.actor.read.remote(list(refs)).future()
        return call

    def held_out(self, limit: int | None, group_by: str | None) -> Future[list[tuple[StoredPrompt, str]]]:
        call: Future[list[tuple[StoredPrompt, str]]] = self.actor.held_out.remote(limit, group_by).future()
        return call

    def state(self) -> Future[dict[str, Any]]:
        call: Future[dict[str, Any]] = self.actor.state.remote().future()
        return call

    def load_state(self, state: Mapping[str, Any]) -> Future[None]:
        call: Future[None] = self.actor.load_state.remote(state).future()
        return call

    def report(self) -> Future[DataActorReport]:
        call: Future[DataActorReport] = self.actor.report.remote().future()
        return call
