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


class Actor(Protocol):
    """An actor that another one like it may replace."""

    @property
    def id(self) -> str:
        """Ray's id of it, which an error has as `actor_id` that comes of its death."""
        ...

    @property
    def name(self) -> str:
        """Its name for the user, which its replacement has too."""
        ...

    def start(self) -> Future[None]:
        """Make it ready."""
        ...

    def node(self) -> Future[str]:
        """Ray's id of its node."""
        ...

    def check_health(self) -> Future[None]:
        """Answered as long as it can work, whatever else it is doing."""
        ...

    def kill(self) -> None:
        """End it at once, also where it hangs. Whoever waits for one of its answers gets an error."""
        ...


class Engine(Actor, Protocol):
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

    def has_answered(self, group: Reference) -> bool:
        """Whether what `sample` returned is there."""
        ...


class Rewards(Actor, Protocol):
    """A reward actor, which scores one group at a time."""

    def score(self, group: Reference) -> tuple[Reference, Future[GroupSummary]]:
        """The verdicts on a group, and its summary."""
        ...


class Data(Actor, Protocol):
    """The one actor that reads data."""

    def take(self, n: int) -> Future[tuple[list[StoredPrompt], dict[str, Any]]]:
        """The next `n` prompts, and the cursor behind them."""
        ...

    def read(self, refs: Sequence[PromptRef]) -> Future[list[StoredPrompt]]:
        """These prompts again."""
        ...

    def held_out(self, limit: int | None, group_by: str | None) -> Future[list[tuple[StoredPrompt, str]]]:
        """At most `limit` held-out prompts, each with what its column `group_by` holds."""
        ...

    def load_state(self, state: Mapping[str, Any] | None) -> Future[None]:
        """Go on behind a cursor; None is the beginning."""
        ...


class Learner(Protocol):
    """The learner, which is `weight_sync.protocols.WeightLearner` too."""

    def update(self, groups: Sequence[StoredGroup], summaries: Sequence[GroupSummary], version: int) -> UpdateStats: ...

    def save_checkpoint(self, directory: str | Path) -> None: ...

    def load_checkpoint(self, directory: str | Path) -> None: ...

    def save_pretrained(self, directory: str | Path) -> None: ...

    def form_weight_group(self, engines: Sequence[EngineHandle]) -> None: ...

    def send_weights(self) -> TransferReport: ...
