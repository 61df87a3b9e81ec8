"""GroupBuffer: the ledger and the groups in flight are one thing, a state machine per group.

    issued(batch) ─▶ scored ◀─▶ sealed(step) ─▶ trained(step)
     ▲  │ └── retry: the next attempt
     │  └───── quarantined(detail): too many engines died of it
     └──────── dropped(reason, detail), from any state before trained

A prompt that was handed out is trained exactly once per epoch, or was dropped or quarantined with its reason. Together
with the data cursor this is what a resume needs: rows before the cursor are outstanding here, trained or given up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from rollout.types import GroupSummary, PromptRef, StoredGroup, StoredPrompt
from saccade.fleet.pool import Member, Sent


class LedgerError(AssertionError):
    """A transition that the picture does not have, say to train a group twice: a defect of the driver, never of the
    data."""


class State(StrEnum):
    ISSUED = "issued"
    SCORED = "scored"
    SEALED = "sealed"
    TRAINED = "trained"
    DROPPED = "dropped"
    QUARANTINED = "quarantined"


class DropReason(StrEnum):
    """Why a group was not trained. What exactly happened stands beside it, as a detail."""

    FAILED = "its completions could not be sampled"
    UNSCORED = "fewer than two scores"
    NO_SIGNAL = "its scores are all equal (algorithm.refill)"
    NOT_TAKEN = "its optimizer step was not taken"
    STALE = "older than rollout.max_staleness"
    """Its prompt is issued again."""
    LOST = "its contents went with the node or the process that kept them"
    """Its prompt is issued again."""


@dataclass(eq=False)
class Group:
    """One group as the driver knows it: references and a summary, no tokens and no pixels."""

    prompt: StoredPrompt
    batch: int
    """The batch that it was admitted for; a policy may seal it with another."""
    slot: int
    """Its place in the batch."""
    late: bool = False
    """Whether its prompt was dropped as too stale before: now the step waits for it."""
    version: int = 0
    """The version that the engines held when this attempt was sent: none of its tokens is older."""
    state: State = State.ISSUED
    step: int | None = None
    """The step that it was sealed for."""
    since: float = field(default_factory=time.monotonic)
    """The time of the last transition, on the clock of `time.monotonic`."""
    stored: StoredGroup | None = None
    """The place where the group is, or will be, in the object store; None where it is not kept."""
    sent: Sent[Any] | None = None
    """With which engine the attempt is, or was; None before it was sent."""
    scorer: Member[Any] | None = None
    """The reward actor that scores it."""
    pending: Future[GroupSummary] | None = None
    """Completed when the attempt has ended, scored or failed; None before it was sent."""
    deaths: int = 0
    """Engines that died while they had this group."""
    summary: GroupSummary | None = None
    """Summary of the attempt that has ended."""

    @property
    def ref(self) -> PromptRef:
        return self.prompt.ref


class GroupBuffer:
    """All groups that were issued and neither trained nor dropped; `(uid, epoch)` is the unit that counts."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int], Group] = {}
        self._batches: dict[int, dict[int, Group]] = {}
        """The same by batch and slot, since every end of a group asks about a batch."""
        self._scored: dict[tuple[str, int], Group] = {}
        self.trained = 0
        """Groups trained so far."""
        self.dropped: Counter[tuple[DropReason, str]] = Counter()
        """Groups given up so far, by reason and detail."""
        self.quarantined: dict[tuple[str, int], str] = {}
        """The reasons why groups are not tried again, by uid and epoch."""
        self.on_end: Callable[[Group, str], None] = lambda group, detail: None
        """Told of each group that was trained or given up, and why."""
        self.next_batch = 0
        """The first batch that was not admitted yet."""

    def issue(
        self,
        batch: int,
        prompts: Sequence[StoredPrompt],
        slots: Sequence[int] | None = None,
        *,
        late: bool = False,
    ) -> list[Group]:
        """Enter prompts that were handed out for `batch`, at the places `slots` of it (by default 0, 1, ...)."""
        slots = range(len(prompts)) if slots is None else slots
        groups = [Group(prompt, batch, slot, late) for prompt, slot in zip(prompts, slots, strict=True)]
        for group in groups:
            key = (group.ref.uid, group.ref.epoch)
            if key in self._groups:
                raise LedgerError(f"{group.ref} is already outstanding for batch {self._groups[key].batch}")
            places = self._batches.setdefault(batch, {})
            if group.slot in places:
                raise LedgerError(f"place {group.slot} of batch {batch} belongs to {places[group.slot].ref}")
            self._groups[key] = places[group.slot] = group
        return groups

    def retry(self, group: Group) -> None:
        """Enter that `group` is attempted once more."""
        self._enter(self._expect(group.ref, State.ISSUED), State.ISSUED)
        group.prompt = replace(group.prompt, ref=group.ref.retry())

    def score(self, group: Group) -> None:
        """Enter that `group` was generated and scored."""
        self._enter(self._expect(group.ref, State.ISSUED), State.SCORED)

    def seal(self, step: int, groups: Sequence[Group]) -> None:
        """Enter that `groups`, all scored, go into the update `step`."""
        for group in groups:
            self._enter(self._expect(group.ref, State.SCORED), State.SEALED)
            group.step = step

    def unseal(self, groups: Sequence[Group]) -> None:
        """Enter that `groups` did not go into the update for which they were sealed."""
        for group in groups:
            self._enter(self._expect(group.ref, State.SEALED), State.SCORED)
            group.step = None

    def train(self, ref: PromptRef) -> None:
        """Enter that this group went into an optimizer step that was taken."""
        self._end(self._expect(ref, State.SEALED), State.TRAINED, "")
        self.trained += 1

    def drop(self, ref: PromptRef, reason: DropReason, detail: str = "") -> None:
        """Give this group up. `detail` says in words for the user what happened."""
        self._end(self._expect(ref, State.ISSUED, State.SCORED, State.SEALED), State.DROPPED, detail or reason)
        self.dropped[reason, detail] += 1

    def quarantine(self, ref: PromptRef, detail: str) -> None:
        """Give this group up, since engines die of it. `detail` says in words for the user what happened."""
        self._end(self._expect(ref, State.ISSUED), State.QUARANTINED, detail)
        self.quarantined[ref.uid, ref.epoch] = detail

    def of(self, batch: int) -> list[Group]:
        """The groups that were admitted for `batch`, in the order of their places."""
        found = self._batches.get(batch, {})
        return [found[slot] for slot in sorted(found)]

    def all(self) -> list[Group]:
        """The groups that are neither trained nor given up, in the order in which they were issued."""
        return list(self._groups.values())

    def unsealed(self) -> list[Group]:
        """The groups that are issued or scored, in the order in which they were issued."""
        return [g for g in self.all() if g.state is not State.SEALED]

    def scored(self) -> list[Group]:
        """The groups that are scored and not sealed, in the order in which they were scored."""
        return list(self._scored.values())

    def outstanding(self) -> list[tuple[int, PromptRef]]:
        """`(batch, ref)` of all groups that are neither trained nor dropped, in order of issue."""
        return [(group.batch, group.ref) for group in self.all()]

    def reasons(self) -> str:
        """Return in words how many groups were given up, and why."""
        texts = {(reason, detail): f"{reason}: {detail}" if detail else reason for reason, detail in self.dropped}
        apart = [f"{uid} (epoch {epoch}): {detail}" for (uid, epoch), detail in self.quarantined.items()]
        return "; ".join([*(f"{n} x {texts[key]}" for key, n in self.dropped.items()), *apart])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-compatible. A resume starts `outstanding` again."""
        return {
            "outstanding": [{"batch": g.batch, "late": g.late, "ref": asdict(g.ref)} for g in self.all()],
            "trained": self.trained,
            "dropped": [[reason, detail, n] for (reason, detail), n in self.dropped.items()],
            "quarantined": [[uid, epoch, detail] for (uid, epoch), detail in self.quarantined.items()],
        }

    def load_state(
        self,
        state: Mapping[str, Any],
        next_batch: int,
        prompts: Sequence[StoredPrompt],
        place: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> None:
        """Become what `state` was taken of, with the `prompts` of its outstanding groups; batches before `next_batch`
        were trained. `place(i, batch)` says where the i-th of them belongs, by default behind the others of its
        batch."""
        for known in (self._groups, self._batches, self._scored):
            known.clear()
        sizes: Counter[int] = Counter()
        for i, (entry, prompt) in enumerate(zip(state["outstanding"], prompts, strict=True)):
            batch, slot = place(i, entry["batch"]) if place else (entry["batch"], sizes[entry["batch"]])
            self.issue(batch, [prompt], [slot], late=entry["late"])
            sizes[batch] += 1
        self.trained, self.next_batch = state["trained"], next_batch
        self.dropped = Counter({(DropReason(reason), detail): n for reason, detail, n in state["dropped"]})
        self.quarantined = {(uid, epoch): detail for uid, epoch, detail in state["quarantined"]}

    def _expect(self, ref: PromptRef, *states: State) -> Group:
        group = self._groups.get((ref.uid, ref.epoch))
        if group is None:
            raise LedgerError(f"{ref} is not outstanding: it was never issued, or was trained or dropped before")
        if group.state not in states:
            raise LedgerError(f"{ref} is {group.state}, where it should be {' or '.join(states)}")
        return group

    def _enter(self, group: Group, state: State) -> None:
        key = (group.ref.uid, group.ref.epoch)
        self._scored.pop(key, None)
        if state is State.SCORED:
            self._scored[key] = group
        group.state, group.since = state, time.monotonic()

    def _end(self, group: Group, state: State, detail: str) -> None:
        del self._groups[group.ref.uid, group.ref.epoch]
        del self._batches[group.batch][group.slot]
        if not self._batches[group.batch]:
            del self._batches[group.batch]
        self._enter(group, state)
        self.on_end(group, detail)
