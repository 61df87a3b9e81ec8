"""The batch of one optimizer step, as the driver knows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rollout.types import GroupSummary, StoredGroup


@dataclass(frozen=True)
class SealedBatch:
    """The scored groups of one optimizer step: where they are, and their summaries, in the order of their places."""

    groups: tuple[StoredGroup, ...]
    summaries: tuple[GroupSummary, ...]
    dropped: int
    """Groups that were given up since the batch before; the ledger has the reasons."""
    replaced: int = 0
    """Groups without a policy gradient in whose place others were generated."""
    issued_again: int = 0
    """Groups that were too old, whose prompts were issued again."""
    left_out: tuple[GroupSummary, ...] = ()
    """Groups that were scored and are not in the batch: given up for too few scores, or replaced."""

    def counts(self) -> dict[str, Any]:
        """Return what a step's record has beside the batch."""
        return {name: getattr(self, name) for name in ("left_out", "dropped", "replaced", "issued_again")}


@dataclass
class Tally:
    """Counts since the last batch was sealed."""

    given_up: int = 0
    replaced: int = 0
    issued_again: int = 0
    left_out: list[GroupSummary] = field(default_factory=list)
