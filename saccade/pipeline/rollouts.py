"""RolloutPipeline: what goes on around the ledger, beside the steps of `loop.py`.

    admit             gives places to prompts          waits for weights that are new enough, and for vacant places
    sample and score  follows each group to its end    waits for engines and rewards
    seal              makes the batch of a step        waits until its admission has one ready
    train and sync    uses it (saccade/loop.py)        waits for the batch, the learner and the transfer

The driver holds references and a `GroupSummary` per group; tokens and pixels go from actor to actor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from learner.types import RefusedStep
from rollout.types import GroupSummary, PromptRef
from saccade.errors import RunError
from saccade.fleet.tasks import Tasks
from saccade.fleet.waiting import POLL_SECONDS
from saccade.pipeline.admission import Admission
from saccade.pipeline.difficulty import without_signal
from saccade.pipeline.dispatch import Dispatcher
from saccade.pipeline.groups import DropReason, Group, GroupBuffer, State
from saccade.pipeline.prompt_stream import PromptStream
from saccade.pipeline.reward_failures import check_failures, unscored
from saccade.pipeline.sealed_batch import SealedBatch, Tally

MOST_GIVEN_UP = 20
"""Groups given up for each of a batch, before a run is taken for one that no prompt gets through."""
END_TIMEOUT = 30.0
"""Seconds to wait at the end for prompts that are on their way: less than a run survives the head of its Ray."""


@dataclass
class RolloutPipeline:
    prompts: PromptStream
    dispatcher: Dispatcher
    admission: Admission
    prompts_per_step: int
    refill: int = 0
    """Groups without a policy gradient that may be replaced in one batch."""
    max_failed_share: float = 1.0
    """Share of a batch's completions whose reward may fail."""
    _version: int = -1
    """The version that the engines hold; -1 until the first `admit`."""
    _fills_up: bool = False
    """Whether a batch of which a resume found some groups gets others beside them."""
    _vacant: list[tuple[int, int]] = field(default_factory=list)
    """Batch and slot of places whose group was given up, and that go to another prompt."""
    _tally: Tally = field(default_factory=Tally)
    progress: float = 0.0
    """When a group was started or ended last, on the clock of `time.monotonic`."""
    _taking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while prompts are on their way from the data actor into the ledger."""
    _tasks: Tasks = field(default_factory=Tasks)

    @property
    def groups(self) -> GroupBuffer:
        """The ledger: where each group stands that was handed out."""
        return self.dispatcher.groups

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the loops beside the body. What a loop raises is raised by `batch`: an update that goes on meanwhile
        comes to its end and is booked first."""
        self._tasks, self.progress = Tasks(), time.monotonic()
        self._tasks.spawn(self._admit_loop())
        try:
            yield
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(END_TIMEOUT):
                    await self._taking.acquire()  # what the data actor has handed out is in the ledger
            await self._tasks.cancel()
            self._taking = asyncio.Lock()

    def admit(self, version: int) -> None:
        """Let prompts be handed out for every batch that is due while the engines hold `version`. What a resume found
        outstanding comes before new prompts."""
        self._version = version
        self._tasks.notify()

    def check(self) -> None:
        """Raises what a loop raised."""
        self._tasks.check()

    async def batch(self, step: int) -> SealedBatch:
        """Wait for the batch of the update `step`.

        Raises RunError when an engine died, nothing ended in time, the rewards failed for too many completions, or
        nothing of the batch is left."""
        self.progress = time.monotonic()
        while True:
            changed = self._tasks.changed
            self.dispatcher.check_stop()
            self.check()
            if (sealed := self._seal(step)) is not None:
                return sealed
            if time.monotonic() - self.progress > self.dispatcher.patience:
                unsealed = self.groups.unsealed()
                waiting = [group for group in unsealed if group.pending is not None]
                self.dispatcher.end_silence(waiting, f"of {len(unsealed)} groups in flight")
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), POLL_SECONDS)

    def book(self, batch: SealedBatch, refused: Sequence[RefusedStep]) -> None:
        """Enter a batch that went through an update into the ledger. A group with fewer than two scores took no part
        in it, and one whose step was `refused` was not trained: they are dropped with their reasons."""
        reasons = {ref: step.reason for step in refused for ref in step.prompts}
        for summary in batch.summaries:
            if detail := unscored(summary):
                self.groups.drop(summary.ref, DropReason.UNSCORED, detail)
            elif detail := reasons.get(summary.ref):
                self.groups.drop(summary.ref, DropReason.NOT_TAKEN, detail)
            else:
                self.groups.train(summary.ref)

    async def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of data and groups, as of one moment."""
        async with self._taking:
            return {**self.prompts.state(), "ledger": self.groups.state()}

    async def load_state(self, state: Mapping[str, Any], version: int) -> None:
        """Continue as of `state`, with `version` updates done; before the loops run. Raises RunError if prompts cannot
        be read again in time."""
        await self.prompts.load_state(state)
        outstanding = [PromptRef(**entry["ref"]) for entry in state["ledger"]["outstanding"]]
        prompts = await self.prompts.read(outstanding) if outstanding else []

        def place(i: int, batch: int) -> tuple[int, int]:
            return version + i // self.prompts_per_step, i % self.prompts_per_step

        # A batch of which groups went into others has gaps, and is filled up.
        overtaken = any(entry["batch"] < version for entry in state["ledger"]["outstanding"])
        self._fills_up = self.admission.refills_places or overtaken
        self._version, self._vacant, self._tally = -1, [], Tally()
        self.groups.load_state(state["ledger"], version, prompts, place if self._fills_up else None)

    async def give_back(self, batch: SealedBatch, lost: Sequence[PromptRef]) -> None:
        """Take back a batch that was not trained, since the contents of some groups are lost: their prompts are read
        and issued again."""
        refs, gone = {summary.ref for summary in batch.summaries}, set(lost)
        groups = [group for group in self.groups.all() if group.ref in refs]
        self.groups.unseal(groups)
        again = [group for group in groups if group.ref in gone]
        for group, prompt in zip(again, await self.prompts.read([group.ref for group in again]), strict=True):
            group.prompt = prompt
            self._issue_again(group, DropReason.LOST)

    # ------------------------------------------------------------------ admit

    async def _admit_loop(self) -> None:
        while True:
            changed = self._tasks.changed
            async with self._taking:
                due = self.admission.due(self.groups, self._version) if self._version >= 0 else ()
                for batch in due:
                    await self._admit_batch(batch)
                vacant = sorted(self._vacant)
                for batch in dict.fromkeys(batch for batch, _ in vacant):
                    slots = [slot for b, slot in vacant if b == batch]
                    groups = await self._issue(batch, slots)
                    self._vacant = [place for place in self._vacant if place not in vacant or place[0] != batch]
                    self._start(groups)
            if due or vacant:
                self._tasks.notify()
            await changed.wait()

    async def _admit_batch(self, batch: int) -> None:
        """Start what a resume found outstanding of `batch`, or else new prompts."""
        known = self.groups.of(batch)
        slots = {*range(self.prompts_per_step)} - {group.slot for group in known}
        if known and not self._fills_up:
            slots = set()
        self._start([*known, *await self._issue(batch, sorted(slots))])
        self.groups.next_batch = batch + 1

    async def _issue(self, batch: int, slots: Sequence[int]) -> list[Group]:
        """Give the places `slots` of `batch` to the next prompts."""
        return self.groups.issue(batch, await self.prompts.take(len(slots)), slots)

    # ------------------------------------------------------------------ sample and score

    def _start(self, groups: Sequence[Group]) -> None:
        self.dispatcher.start(groups, self._version, together=self.admission.together)
        self.progress = time.monotonic()
        for group in groups:
            self._tasks.spawn(self._follow(group))

    async def _follow(self, group: Group) -> None:
        await self.dispatcher.follow(group, lambda: self._version)
        self.progress = time.monotonic()
        if group.state in (State.DROPPED, State.QUARANTINED):
            self._give_up(group)
        elif self.admission.refills_places and group.summary is not None:
            if detail := unscored(group.summary):
                # Before it is given up: where the rewards fail altogether, the run ends with its prompts outstanding.
                completions = self.prompts_per_step * len(group.summary.valid)
                check_failures([*self._tally.left_out, group.summary], self.max_failed_share, completions)
                self._tally.left_out.append(group.summary)
                self.groups.drop(group.ref, DropReason.UNSCORED, detail)
                self._give_up(group)
            elif self._tally.replaced < self.refill and without_signal([group.summary])[0]:
                self._replace(group)
        self._tasks.notify()

    def _give_up(self, group: Group) -> None:
        """Count a group that was dropped, and give its place away."""
        self._tally.given_up += 1
        self._check_progress()
        if self.admission.refills_places:
            self._vacant.append((group.batch, group.slot))

    def _check_progress(self) -> None:
        """Raises RunError when so many groups led to nothing that no batch will ever come together."""
        if self._tally.given_up + self._tally.issued_again > MOST_GIVEN_UP * self.prompts_per_step:
            raise RunError(f"no batch comes together: {self.groups.reasons()}")

    def _replace(self, group: Group) -> None:
        """Give the place of a group without a policy gradient to another prompt."""
        assert group.summary is not None
        self.prompts.observe([group.summary])
        if detail := unscored(group.summary):
            self.groups.drop(group.ref, DropReason.UNSCORED, detail)
        else:
            self.groups.drop(group.ref, DropReason.NO_SIGNAL)
        self._tally.replaced += 1
        self._tally.left_out.append(group.summary)
        self._vacant.append((group.batch, group.slot))

    # ------------------------------------------------------------------ seal

    def _seal(self, step: int) -> SealedBatch | None:
        """The batch of `step`, if it is ready."""
        for group in self.admission.stale(self.groups, step):
            self._issue_again(group, DropReason.STALE)
        found = self.admission.ready(self.groups, step)
        if found is None or (self._vacant and not self.admission.refills_places):
            return None
        beside = self._tally.left_out if self.admission.refills_places else ()
        check_failures([*_summaries(found), *beside], self.max_failed_share)
        if not self.admission.refills_places and (flat := self._flat(found)):
            for group in flat:
                self._replace(group)
            self._tasks.notify()
            return None
        if not found:
            raise RunError(f"every group of batch {step} was given up: {self.groups.reasons()}")
        self.groups.seal(step, found)
        summaries = _summaries(found)
        self.prompts.observe(summaries)
        stored = tuple(group.stored for group in found if group.stored is not None)
        tally, self._tally = self._tally, Tally()
        return SealedBatch(
            stored, tuple(summaries), tally.given_up, tally.replaced, tally.issued_again, tuple(tally.left_out)
        )

    def _issue_again(self, group: Group, reason: DropReason) -> None:
        """Drop a group that cannot be trained, and issue its prompt again."""
        self.groups.drop(group.ref, reason)
        prompt = replace(group.prompt, ref=group.ref.retry())
        self._start(self.groups.issue(group.batch, [prompt], [group.slot], late=True))
        self._tally.issued_again += 1
        self._check_progress()

    def _flat(self, groups: Sequence[Group]) -> list[Group]:
        """Those of `groups` without a policy gradient, as many as may still be replaced."""
        flat = [g for g, none in zip(groups, without_signal(_summaries(groups)), strict=True) if none]
        return flat[: self.refill - self._tally.replaced]


def _summaries(groups: Sequence[Group]) -> list[GroupSummary]:
    """Return the summaries of groups that are scored."""
    return [group.summary for group in groups if group.summary is not None]
