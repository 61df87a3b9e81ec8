"""GroupBuffer: the ledger and the groups in flight are one thing, a state machine per group.

    issued(batch) ─▶ scored ─▶ sealed ─▶ trained
     ▲  └── retry: the next attempt
     └───────── dropped(reason), from any state before trained

A prompt that was handed out is trained exactly once per epoch, or was dropped with its reason. Together with the data
cursor this is what a resume needs: rows before the cursor are outstanding here, trained or dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from rollout.types import GroupSummary, PromptRef, StoredGroup, StoredPrompt


class LedgerError(AssertionError):
    """A transition that the picture does not have, say to train a group twice: a defect of the driver, never of the
    data."""


class State(StrEnum):
    ISSUED = "issued"
    SCORED = "scored"
    SEALED = "sealed"
    TRAINED = "trained"
    DROPPED = "dropped"


@dataclass(eq=False)
class Group:
    """One group as the driver knows it: references and a summary, no tokens and no pixels."""

    prompt: StoredPrompt
    batch: int
    slot: int
    """Its place in the batch."""
    state: State = State.ISSUED
    stored: StoredGroup | None = None
    """The place where the group is, or will be, in the object store; None where it is not kept."""
    pending: Future[GroupSummary] | None = None
    """Completed when the attempt has ended, scored or failed."""
    summary: GroupSummary | None = None
    """Summary of the attempt that has ended."""

    @property
    def ref(self) -> PromptRef:
        return self.prompt.ref


class GroupBuffer:
    """All groups that were issued and neither trained nor dropped; `(uid, epoch)` is the unit that counts."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int], Group] = {}
        self.trained = 0
        """Groups trained so far."""
        self.dropped: Counter[str] = Counter()
        """Groups given up so far, by reason."""
        self.next_batch = 0
        """The first batch that was not admitted yet."""

    def issue(self, batch: int, prompts: Sequence[StoredPrompt], slots: Sequence[int] | None = None) -> list[Group]:
        """Enter prompts that were handed out for `batch`, at the places `slots` of it (by default 0, 1, ...)."""
        slots = range(len(prompts)) if slots is None else slots
        groups = [Group(prompt, batch, slot) for prompt, slot in zip(prompts, slots, strict=True)]
        for group in groups:
            key = (group.ref.uid, group.ref.epoch)
            if key in self._groups:
                raise LedgerError(f"{group.ref} is already outstanding for batch {self._groups[key].batch}")
            self._groups[key] = group
        return groups

    def retry(self, group: Group) -> None:
        """Enter that `group` is attempted once more."""
        self._expect(group.ref, State.ISSUED)
        group.prompt = replace(group.prompt, ref=group.ref.retry())

    def score(self, group: Group) -> None:
        """Enter that `group` was generated and scored."""
        self._expect(group.ref, State.ISSUED).state = State.SCORED

    def seal(self, batch: int) -> list[Group]:
        """Seal `batch`: what is left of it, all scored, goes into an update. Returns it in the order of its places."""
        groups = self.of(batch)
        for group in groups:
            self._expect(group.ref, State.SCORED).state = State.SEALED
        return groups

    def train(self, ref: PromptRef) -> None:
        """Enter that this group went into an optimizer step that was taken."""
        self._end(self._expect(ref, State.SEALED), State.TRAINED)
        self.trained += 1

    def drop(self, ref: PromptRef, reason: str) -> None:
        """Give this group up: it will not be trained in this epoch."""
        self._end(self._expect(ref, State.ISSUED, State.SCORED, State.SEALED), State.DROPPED)
        self.dropped[reason] += 1

    def of(self, batch: int) -> list[Group]:
        """The groups of `batch`, in the order of their places."""
        return sorted((g for g in self._groups.values() if g.batch == batch), key=lambda g: g.slot)

    def outstanding(self) -> list[tuple[int, PromptRef]]:
        """`(batch, ref)` of all groups that are neither trained nor dropped, in order of issue."""
        return [(group.batch, group.ref) for group in self._groups.values()]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-compatible. A resume starts `outstanding` again."""
        return {
            "outstanding": [{"batch": batch, **asdict(ref)} for batch, ref in self.outstanding()],
            "trained": self.trained,
            "dropped": dict(self.dropped),
        }

    def load_state(
        self,
        state: Mapping[str, Any],
        next_batch: int,
        read: Callable[[Sequence[PromptRef]], Sequence[StoredPrompt]],
    ) -> None:
        """Become what `state` was taken of. `read` returns prompts again; batches before `next_batch` were trained."""
        entries = [dict(entry) for entry in state["outstanding"]]
        batches = [entry.pop("batch") for entry in entries]
        prompts = read([PromptRef(**entry) for entry in entries]) if entries else ()
        self._groups.clear()
        sizes: Counter[int] = Counter()
        for batch, prompt in zip(batches, prompts, strict=True):
            self.issue(batch, [prompt], [sizes[batch]])
            sizes[batch] += 1
        self.trained, self.dropped, self.next_batch = state["trained"], Counter(state["dropped"]), next_batch

    def _expect(self, ref: PromptRef, *states: State) -> Group:
        group = self._groups.get((ref.uid, ref.epoch))
        if group is None:
            raise LedgerError(f"{ref} is not outstanding: it was never issued, or was trained or dropped before")
        if group.state not in states:
            raise LedgerError(f"{ref} is {group.state}, where it should be {' or '.join(states)}")
        return group

    def _end(self, group: Group, state: State) -> None:
        del self._groups[group.ref.uid, group.ref.epoch]
        group.state = state
