"""RolloutPipeline: admits prompts batch by batch, and seals batches in order.

    admit(version)   Admission says which batches are due ─▶ data.take ─▶ Difficulty ─▶ GroupBuffer ─▶ Dispatcher.start
    collect(batch)   Dispatcher.finish ─▶ rewards that failed? ─▶ refill ─▶ sealed
    book(batch)      each group of it is trained or dropped

The driver holds references and a `GroupSummary` per group; tokens and pixels go from actor to actor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learner.types import RefusedStep
from rollout.types import GroupSummary, PromptRef, StoredGroup, StoredPrompt
from saccade.errors import RunError
from saccade.fleet.protocols import Data
from saccade.fleet.waiting import CALL_TIMEOUT, wait_for
from saccade.pipeline.admission import Admission
from saccade.pipeline.difficulty import Difficulty, without_signal
from saccade.pipeline.dispatch import Dispatcher
from saccade.pipeline.groups import Group, GroupBuffer
from saccade.pipeline.reward_failures import check_failures, unscored

MOST_PASSED_OVER = 1000
"""Prompts looked at for each that is taken, before a run is taken for finished."""


@dataclass(frozen=True)
class SealedBatch:
    """The scored groups of one optimizer step: where they are, and their summaries, in order of admission."""

    groups: tuple[StoredGroup, ...]
    summaries: tuple[GroupSummary, ...]
    dropped: int
    """Groups admitted for this batch that were given up; the ledger has the reasons."""
    replaced: int = 0
    """Groups without a policy gradient in whose place others were generated."""


@dataclass
class RolloutPipeline:
    data: Data
    dispatcher: Dispatcher
    admission: Admission
    prompts_per_step: int
    refill: int = 0
    """Groups without a policy gradient that may be replaced in one batch."""
    difficulty: Difficulty | None = None
    """Passes over prompts; None passes over none."""
    max_failed_share: float = 1.0
    """Share of a batch's completions whose reward may fail."""

    @property
    def groups(self) -> GroupBuffer:
        """The ledger: where each group stands that was handed out."""
        return self.dispatcher.groups

    def admit(self, version: int) -> int:
        """Hand out prompts for every batch that is due while the engines hold `version`. Returns how many groups were
        started. What a resume found outstanding comes before new prompts."""
        started = 0
        for batch in self.admission.due(self.groups, version):
            # The ledger has prompts before an engine does: the data cursor is past them, whatever fails from here on.
            groups = self.groups.of(batch) or self.groups.issue(batch, self._take(self.prompts_per_step))
            self.dispatcher.start(groups, together=self.admission.together)
            self.groups.next_batch = batch + 1
            started += len(groups)
        return started

    def collect(self, batch: int) -> SealedBatch:
        """Wait until every group of `batch` is scored or given up, and seal it.

        Raises RunError when an engine died, a group missed every deadline, the rewards failed for too many completions,
        or nothing of the batch is left."""
        groups = self.groups.of(batch)
        self._finish(batch, groups)
        replacements = self._replace_without_signal(batch)
        failed = [g for g in (*groups, *replacements) if g.summary is not None and g.summary.failure is not None]
        sealed = self.groups.seal(batch)
        if not sealed:
            raise RunError(f"every group of batch {batch} was given up: {dict(self.groups.dropped)}")
        summaries = _summaries(sealed)
        self._observe(summaries)
        stored = tuple(group.stored for group in sealed if group.stored is not None)
        return SealedBatch(stored, tuple(summaries), len(failed), len(replacements))

    def book(self, batch: SealedBatch, refused: Sequence[RefusedStep]) -> None:
        """Enter a batch that went through an update into the ledger. A group with fewer than two scores took no part
        in it, and one whose step was `refused` was not trained: they are dropped with their reasons."""
        reasons = {ref: step.reason for step in refused for ref in step.prompts}
        for summary in batch.summaries:
            if reason := unscored(summary) or reasons.get(summary.ref):
                self.groups.drop(summary.ref, reason)
            else:
                self.groups.train(summary.ref)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of data and groups."""
        return {
            "ledger": self.groups.state(),
            "cursor": wait_for(self.data.state(), CALL_TIMEOUT, "the data cursor"),
            "difficulty": None if self.difficulty is None else self.difficulty.state(),
        }

    def load_state(self, state: Mapping[str, Any], version: int, timeout: float) -> None:
        """Continue from `state` at `version`: groups that were outstanding start again when their batch is due."""
        wait_for(self.data.load_state(state["cursor"]), CALL_TIMEOUT, "the data cursor to be set")

        def read(refs: Sequence[PromptRef]) -> list[StoredPrompt]:
            return wait_for(self.data.read(refs), timeout, "prompts in flight (cluster.timeout)")

        self.groups.load_state(state["ledger"], version, read)
        if self.difficulty is not None and state["difficulty"] is not None:
            self.difficulty.load_state(state["difficulty"])

    def _take(self, count: int) -> list[StoredPrompt]:
        """The next prompts that are worth it. Raises RunError when hardly any is."""
        taken: list[StoredPrompt] = []
        looked_at = 0
        while len(taken) < count:
            if looked_at > MOST_PASSED_OVER * count:
                raise RunError(
                    f"{looked_at - len(taken)} prompts in a row have a mean reward outside algorithm.reward_range: "
                    "widen it, or end the run"
                )
            missing = count - len(taken)
            prompts = wait_for(self.data.take(missing), self.dispatcher.group_timeout, "the next prompts")
            looked_at += missing
            for prompt in prompts:
                if self.difficulty is None or self.difficulty.admits(prompt.ref):
                    taken.append(prompt)
                else:
                    self.difficulty.passed_over += 1
        return taken

    def _finish(self, batch: int, groups: Sequence[Group]) -> None:
        self.dispatcher.finish(groups, f"groups of batch {batch}")
        check_failures(_summaries(self.groups.of(batch)), self.max_failed_share)

    def _replace_without_signal(self, batch: int) -> list[Group]:
        """Put new prompts in the place of groups whose scores are all equal, until none is left or `refill` is spent.
        Returns the new groups."""
        replacements: list[Group] = []
        while spare := self.refill - len(replacements):
            scored = self.groups.of(batch)
            flat = [g for g, none in zip(scored, without_signal(_summaries(scored)), strict=True) if none][:spare]
            if not flat:
                break
            prompts = self._take(len(flat))
            for group, summary in zip(flat, _summaries(flat), strict=True):
                self._observe([summary])
                self.groups.drop(group.ref, unscored(summary) or "its scores are all equal (algorithm.refill)")
            new = self.groups.issue(batch, prompts, [group.slot for group in flat])
            self.dispatcher.start(new, together=self.admission.together)
            self._finish(batch, new)
            replacements += new
        return replacements

    def _observe(self, summaries: Sequence[GroupSummary]) -> None:
        if self.difficulty is not None:
            for summary in summaries:
                self.difficulty.observe(summary)


def _summaries(groups: Sequence[Group]) -> list[GroupSummary]:
    """Return the summaries of groups that are scored."""
    return [group.summary for group in groups if group.summary is not None]
