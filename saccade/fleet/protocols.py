"""Protocols: what the driver needs of the actors of a run. `handles.py` implements them over Ray; tests do without.

A call returns at once: a `Future` where the driver reads the answer, a `Reference` where the answer goes on to another
actor and the driver never sees it. The learner's calls block, with a limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from learner.types import UpdateStats
from rollout.engines.protocol import SamplingParams
from rollout.types import GroupSummary, PromptRef, StoredGroup, StoredPrompt, Together

if TYPE_CHECKING:
    from weight_sync.protocols import EngineHandle, TransferReport

Reference = Any
"""Names something in the object store: Ray's ObjectRef."""


class Engine(Protocol):
    """A rollout engine, which samples groups."""

    def sample(
        self,
        prompt: Reference,
        sampling: SamplingParams,
        seed: int | None = None,
        attempt: int | None = None,
        together: Together | None = None,
    ) -> Reference:
        """The RolloutGroup of a prompt, or a RolloutFailure."""
        ...


class Rewards(Protocol):
    """A reward actor, which scores one group at a time."""

    def score(self, group: Reference) -> tuple[Reference, Future[GroupSummary]]:
        """The verdicts on a group, and its summary."""
        ...


class Data(Protocol):
    """The one actor that reads data."""

    def take(self, n: int) -> Future[list[StoredPrompt]]:
        """The next `n` prompts."""
        ...

    def read(self, refs: Sequence[PromptRef]) -> Future[list[StoredPrompt]]:
        """These prompts again."""
        ...

    def state(self) -> Future[dict[str, Any]]:
        """The cursor behind the last prompt that `take` returned."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> Future[None]:
        """Go on where `state` was taken."""
        ...


class Learner(Protocol):
    """The learner, which is `weight_sync.protocols.WeightLearner` too."""

    def update(self, groups: Sequence[StoredGroup], summaries: Sequence[GroupSummary], version: int) -> UpdateStats: ...

    def save_checkpoint(self, directory: str | Path) -> None: ...

    def load_checkpoint(self, directory: str | Path) -> None: ...

    def save_pretrained(self, directory: str | Path) -> None: ...

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None: ...

    def send_weights(self) -> TransferReport: ...
