"""Ledger: which group was issued, trained or dropped. A prompt handed out is trained exactly once per epoch, or stands
here with its reason.

    DataActor ──issue──▶ outstanding ──train──▶ trained (counted)
                             │  ▲ └────drop───▶ dropped (with reason)
                             └retry

Together with the data cursor it is what a resume needs: rows before the cursor are outstanding, trained or dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rollout.types import PromptRef


class LedgerError(AssertionError):
    """A group would be trained twice, or without having been issued: a defect of the driver, never of the data."""


class Ledger:
    """Pure bookkeeping over `PromptRef`s; `(uid, epoch)` is the unit that counts."""

    def __init__(self) -> None:
        self._outstanding: dict[tuple[str, int], tuple[int, PromptRef]] = {}
        self.trained = 0
        """Groups trained so far."""
        self.dropped: Counter[str] = Counter()
        """Groups given up so far, by reason."""

    def issue(self, ref: PromptRef, batch: int) -> None:
        """`ref` was handed to an engine for batch number `batch`."""
        key = (ref.uid, ref.epoch)
        if key in self._outstanding:
            raise LedgerError(f"{ref} is already outstanding for batch {self._outstanding[key][0]}")
        self._outstanding[key] = (batch, ref)

    def retry(self, ref: PromptRef) -> PromptRef:
        """Another attempt at an outstanding group; returns its new reference."""
        batch, current = self._outstanding[self._key(ref)]
        again = current.retry()
        self._outstanding[self._key(ref)] = (batch, again)
        return again

    def train(self, refs: Iterable[PromptRef]) -> None:
        """These groups went into an optimizer step that succeeded."""
        for ref in refs:
            del self._outstanding[self._key(ref)]
            self.trained += 1

    def drop(self, ref: PromptRef, reason: str) -> None:
        """This group was given up and will not be trained in this epoch."""
        del self._outstanding[self._key(ref)]
        self.dropped[reason] += 1

    def outstanding(self) -> list[tuple[int, PromptRef]]:
        """`(batch, ref)` of all that was issued and neither trained nor dropped, in order of issue."""
        return list(self._outstanding.values())

    def state(self) -> dict[str, Any]:
        """JSON-compatible; a resume issues `outstanding` again."""
        return {
            "outstanding": [{"batch": batch, **asdict(ref)} for batch, ref in self._outstanding.values()],
            "trained": self.trained,
            "dropped": dict(self.dropped),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Ledger:
        ledger = cls()
        for entry in state["outstanding"]:
            fields = dict(entry)
            ledger.issue(PromptRef(**{k: v for k, v in fields.items() if k != "batch"}), fields["batch"])
        ledger.trained = state["trained"]
        ledger.dropped = Counter(state["dropped"])
        return ledger

    def _key(self, ref: PromptRef) -> tuple[str, int]:
        key = (ref.uid, ref.epoch)
        if key not in self._outstanding:
            raise LedgerError(f"{ref} is not outstanding: it was never issued, or was trained or dropped before")
        return key
