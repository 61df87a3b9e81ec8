"""The producer: admits prompts to engines batch by batch, chains rewards onto them, and seals batches in order.

    admit_through(v + max_staleness)            collect(v)
      DataActor.take ─▶ RolloutActor.generate ─▶ RewardActor.score ─▶ (group ref, GroupSummary)
                         │ one object reference per group, resolved between actors: no tokens in the driver

Batch b is trained at policy version b. It may be admitted once the engines hold version b - max_staleness, so that
admission alone bounds staleness; `check_staleness` asserts it at use. A batch consists of the groups admitted for it,
in that order, whichever finishes first: a rerun with the same seed trains the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from rollout.engines.protocol import SamplingParams
from rollout.types import GroupSummary, PromptRef, StoredPrompt, draw_seed
from saccade.errors import RunError
from saccade.fleet.waiting import POLL_SECONDS, first_line, wait_for
from saccade.pipeline.difficulty import Difficulty, without_signal
from saccade.pipeline.ledger import Ledger
from saccade.pipeline.reward_failures import check_failures, unscored

MOST_PASSED_OVER = 1000
"""Prompts looked at for each that is taken, before a run is taken for finished."""


@dataclass(frozen=True)
class SealedBatch:
    """The scored groups of one optimizer step: references to them, and their summaries, in order of admission."""

    groups: tuple[ray.ObjectRef, ...]
    summaries: tuple[GroupSummary, ...]
    dropped: int
    """Groups admitted for this batch that were given up; the ledger has the reasons."""
    replaced: int = 0
    """Groups without a policy gradient in whose place others were generated."""

    @property
    def refs(self) -> list[PromptRef]:
        return [s.ref for s in self.summaries]


@dataclass
class _Group:
    """One admitted group and where it stands."""

    prompt: StoredPrompt
    slot: int
    group: ray.ObjectRef
    summary: ray.ObjectRef
    result: GroupSummary | None = None


@dataclass
class RolloutPipeline:
    """Issues, awaits and seals. Holds object references and summaries only."""

    data: Any
    engines: Sequence[Any]
    rewards: Sequence[Any]
    ledger: Ledger
    sampling: SamplingParams
    run_seed: int
    prompts_per_step: int
    group_timeout: float
    reward_timeout: float
    max_attempts: int = 3
    """Attempts at one group before it is given up and entered in the ledger with its reason."""
    hold_while_admitting: bool = False
    """Queue a batch whole before any of it runs: the same schedule, hence the same bits, in every rerun."""
    refill: int = 0
    """Groups without a policy gradient that may be replaced in one batch."""
    difficulty: Difficulty | None = None
    """Passes over prompts; None: none."""
    max_failed_share: float = 1.0
    """Completions of a batch whose reward may fail, as a share."""
    check_stop: Callable[[], None] = lambda: None
    """Raises RunStopped when the user asked to stop; called while waiting."""
    _batches: dict[int, list[_Group]] = field(default_factory=dict)
    _dropped: dict[int, int] = field(default_factory=dict)
    _admitted: int = -1
    _again: dict[int, Sequence[StoredPrompt]] = field(default_factory=dict)

    def admit_through(self, batch: int) -> int:
        """Hand out prompts for every batch up to and including `batch`. Returns how many groups were issued."""
        issued = 0
        while self._admitted < batch:
            prompts = self._again.pop(self._admitted + 1, None)
            already_issued = prompts is not None
            if prompts is None:
                prompts = self._take(self.prompts_per_step)
            groups = self._batches.setdefault(self._admitted + 1, [])
            self._admit(self._admitted + 1, prompts, range(len(groups), len(groups) + len(prompts)), already_issued)
            self._admitted += 1
            issued += len(prompts)
        return issued

    def go_on_from(self, batch: int, again: Mapping[int, Sequence[StoredPrompt]]) -> None:
        """After a resume: batches before `batch` were trained; `again` are the prompts by batch that the ledger has as
        issued, which are issued once more when their batch is due."""
        self._admitted, self._again = batch - 1, dict(again)

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
            prompts = wait_for(self.data.take.remote(missing), self.group_timeout, "the next prompts")
            looked_at += missing
            for prompt in prompts:
                if self.difficulty is None or self.difficulty.admits(prompt.ref):
                    taken.append(prompt)
                else:
                    self.difficulty.passed_over += 1
        return taken

    def _admit(
        self, batch: int, prompts: Sequence[StoredPrompt], slots: Sequence[int], already_issued: bool = False
    ) -> None:
        """Issue prompts for `batch` at the places `slots` of it, held back until all are queued if reruns are to repeat
        them. In the ledger they are first of all: the data cursor is past them, whatever fails from here on."""
        if not already_issued:
            for prompt in prompts:
                self.ledger.issue(prompt.ref, batch)
        held = self._hold() if self.hold_while_admitting else None
        groups = self._batches[batch]
        sampling = ray.put(self.sampling)
        for slot, prompt in zip(slots, prompts, strict=True):
            groups[slot : slot + 1] = [self._issue(prompt, slot, sampling)]
        if held is not None:
            self._release(batch, [slot % len(self.engines) for slot in slots], held)

    def _hold(self) -> list[int]:
        return wait_for([e.hold.remote() for e in self.engines], self.group_timeout, "the engines to pause")

    def _release(self, batch: int, engine_of: Sequence[int], ended: Sequence[int]) -> None:
        """Let engines run that have got all of their prompts."""
        shares = [engine_of.count(i) for i in range(len(self.engines))]
        calls = [
            engine.release.remote(share, self.sampling.n, count)
            for engine, share, count in zip(self.engines, shares, ended, strict=True)
        ]
        wait_for(calls, self.group_timeout + 60.0, f"batch {batch} to reach the engines' queues")

    def collect(self, batch: int) -> SealedBatch:
        """Wait until every group of `batch` is scored or given up, and seal it.

        Raises RunError when an engine died, a group missed every deadline, the rewards failed for too many completions,
        or nothing of the batch is left."""
        groups = self._batches[batch]
        self._await(batch, groups)
        self._check_failures(groups)
        replaced = self._replace_without_signal(batch)
        kept = [g for g in groups if g.result is not None]
        del self._batches[batch]
        if not kept:
            raise RunError(f"every group of batch {batch} was given up: {dict(self.ledger.dropped)}")
        results = tuple(g.result for g in kept if g.result is not None)
        if self.difficulty is not None:
            for summary in results:
                self.difficulty.observe(summary)
        return SealedBatch(tuple(g.group for g in kept), results, self._dropped.pop(batch, 0), replaced)

    def _check_failures(self, groups: Sequence[_Group]) -> None:
        check_failures([g.result for g in groups if g.result is not None], self.max_failed_share)

    def _replace_without_signal(self, batch: int) -> int:
        """Put new prompts in the place of groups whose scores are all equal, until none is left or `refill` is spent.
        Returns how many were replaced."""
        groups = self._batches[batch]
        spare = self.refill
        while spare:
            scored = [(g, g.result) for g in groups if g.result is not None]
            flat = [g for (g, _), none in zip(scored, without_signal([r for _, r in scored]), strict=True) if none]
            flat = flat[:spare]
            if not flat:
                break
            prompts = self._take(len(flat))
            for group in flat:
                if self.difficulty is not None and group.result is not None:
                    self.difficulty.observe(group.result)
                reason = None if group.result is None else unscored(group.result)
                self.ledger.drop(group.prompt.ref, reason or "its scores are all equal (algorithm.refill)")
            slots = [group.slot for group in flat]
            self._admit(batch, prompts, slots)
            self._await(batch, [groups[slot] for slot in slots])
            self._check_failures(groups)
            spare -= len(flat)
        return self.refill - spare

    def _await(self, batch: int, groups: Sequence[_Group]) -> None:
        """Wait until every one of `groups` is scored or given up."""
        pending = {g.summary: g for g in groups}
        deadline = time.monotonic() + self._patience()
        while pending:
            self.check_stop()
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=POLL_SECONDS, fetch_local=True)
            if ready:
                deadline = time.monotonic() + self._patience()
            for reference, summary in zip(ready, self._summaries(ready), strict=True):
                group = pending.pop(reference)
                if self._settle(batch, group, summary):
                    continue
                pending[group.summary] = group
            if pending and not ready and time.monotonic() > deadline:
                names = ", ".join(str(g.prompt.ref) for g in list(pending.values())[:3])
                raise RunError(
                    f"waited {self._patience():g} s for {len(pending)} of {len(groups)} groups of batch {batch} "
                    f"(first: {names}); raise cluster.timeout (a third of it) if completions take that long"
                )

    def _patience(self) -> float:
        """Longest silence before the wait itself is an error: the actors' own limits, and a margin for transport."""
        return self.group_timeout + 2 * self.reward_timeout + 60.0  # scored together, then perhaps one by one

    def _issue(self, prompt: StoredPrompt, slot: int, sampling: ray.ObjectRef) -> _Group:
        """One group to the engine of its slot (a fixed map, so that reruns repeat it), its reward chained behind."""
        ref = prompt.ref
        seed = draw_seed(self.run_seed, ref.uid, ref.epoch)
        engine = self.engines[(slot + ref.attempt) % len(self.engines)]
        reward = self.rewards[slot % len(self.rewards)]
        group = engine.generate.remote(prompt.prompt, sampling, seed, ref.attempt)
        scored, summary = reward.score.remote(group)
        return _Group(prompt, slot, scored, summary)

    def _summaries(self, ready: Sequence[ray.ObjectRef]) -> list[GroupSummary]:
        """Of groups that have finished. Raises RunError when an actor died with one of them."""
        try:
            return ray.get(ready, timeout=self.reward_timeout)
        except ray.exceptions.RayError as error:
            raise RunError(f"a group was lost with its actor: {first_line(error)}") from error

    def _settle(self, batch: int, group: _Group, summary: GroupSummary) -> bool:
        """Look at a finished group: True when it is scored or given up, False when another attempt is under way."""
        failure = summary.failure
        if failure is None:
            group.result = summary
            return True
        if failure.engine_dead:
            raise RunError(f"engine {failure.engine} died while generating {failure.ref}: {failure.reason}")
        ref = group.prompt.ref
        if failure.retryable and ref.attempt + 1 < self.max_attempts:
            prompt = replace(group.prompt, ref=self.ledger.retry(ref))
            again = self._issue(prompt, group.slot, ray.put(self.sampling))
            group.prompt, group.group, group.summary = prompt, again.group, again.summary
            return False
        self.ledger.drop(ref, failure.reason)
        self._dropped[batch] = self._dropped.get(batch, 0) + 1
        return True


def check_staleness(batch: SealedBatch, version: int, max_staleness: int) -> int:
    """Largest lag of a token behind `version`. Raises AssertionError when admission let an older one through."""
    oldest = min(batch.summaries, key=lambda s: s.oldest_version)
    lag = version - oldest.oldest_version
    if not 0 <= lag <= max_staleness:
        raise AssertionError(
            f"group {oldest.ref} was sampled by version {oldest.oldest_version}, to be trained at version {version}: "
            f"a lag of {lag}, allowed are 0..{max_staleness}"
        )
    return lag
