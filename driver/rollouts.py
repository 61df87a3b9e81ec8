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

from driver.errors import RunError
from driver.ledger import Ledger
from rollout.engine import SamplingParams
from rollout.types import GroupSummary, PromptRef, StoredPrompt, draw_seed

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class SealedBatch:
    """The scored groups of one optimizer step: references to them, and their summaries, in order of admission."""

    groups: tuple[ray.ObjectRef, ...]
    summaries: tuple[GroupSummary, ...]
    dropped: int
    """Groups admitted for this batch that were given up; the ledger has the reasons."""

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
    max_attempts: int
    group_timeout: float
    reward_timeout: float
    hold_while_admitting: bool = False
    """Queue a batch whole before any of it runs: the same schedule, hence the same bits, in every rerun."""
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
                prompts = wait_for(self.data.take.remote(self.prompts_per_step), self.group_timeout, "the next prompts")
            admit = self._admit_whole if self.hold_while_admitting else self._admit
            admit(self._admitted + 1, prompts, already_issued)
            issued += len(prompts)
        return issued

    def go_on_from(self, batch: int, again: Mapping[int, Sequence[StoredPrompt]]) -> None:
        """After a resume: batches before `batch` were trained; `again` are the prompts by batch that the ledger has as
        issued, which are issued once more when their batch is due."""
        self._admitted, self._again = batch - 1, dict(again)

    def _admit(self, batch: int, prompts: Sequence[StoredPrompt], already_issued: bool) -> None:
        groups = self._batches.setdefault(batch, [])
        sampling = ray.put(self.sampling)
        for prompt in prompts:
            if not already_issued:
                self.ledger.issue(prompt.ref, batch)
            groups.append(self._issue(prompt, len(groups), sampling))
        self._admitted = batch

    def _admit_whole(self, batch: int, prompts: Sequence[StoredPrompt], already_issued: bool) -> None:
        ended = wait_for([e.hold.remote() for e in self.engines], self.group_timeout, "the engines to pause")
        self._admit(batch, prompts, already_issued)
        shares = [len(range(i, len(prompts), len(self.engines))) for i in range(len(self.engines))]
        calls = [
            engine.release.remote(share, self.sampling.n, count)
            for engine, share, count in zip(self.engines, shares, ended, strict=True)
        ]
        wait_for(calls, self.group_timeout + 60.0, f"batch {batch} to reach the engines' queues")

    def collect(self, batch: int) -> SealedBatch:
        """Wait until every group of `batch` is scored or given up, and seal it.

        Raises RunError when an engine died, a group missed every deadline, or nothing of the batch is left."""
        groups = self._batches[batch]
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
                    f"(first: {names}); raise rollout.group_timeout if completions take that long"
                )
        kept = [g for g in groups if g.result is not None]
        del self._batches[batch]
        if not kept:
            raise RunError(f"every group of batch {batch} was given up: {dict(self.ledger.dropped)}")
        results = tuple(g.result for g in kept if g.result is not None)
        return SealedBatch(tuple(g.group for g in kept), results, self._dropped.pop(batch, 0))

    def _patience(self) -> float:
        """Longest silence before the wait itself is an error: the actors' own limits, and a margin for transport."""
        return self.group_timeout + self.reward_timeout + 60.0

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
            raise RunError(f"a group was lost with its actor: {_first_line(error)}") from error

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


def wait_for(reference: ray.ObjectRef | list[ray.ObjectRef], timeout: float, what: str) -> Any:
    """`ray.get` with a limit that says what it waited for. Raises RunError."""
    try:
        return ray.get(reference, timeout=timeout)
    except ray.exceptions.GetTimeoutError as error:
        raise RunError(f"waited {timeout:g} s for {what}") from error
    except ray.exceptions.RayTaskError as error:
        raise RunError(f"while waiting for {what}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise RunError(f"while waiting for {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
