"""sync_weights: one update of all rollout engines, in one function.

    driver ── pause ─────────────────────────────────▶ engines    running requests freeze; caches of old weights go
           ── send_weights ─▶ learner ── broadcast ──▶ engines    bucket by bucket; each side digests what it sees
           ── compare digests, load coverage
           ── commit(version) ───────────────────────▶ engines    tokens sampled from now on carry it
           ── resume ────────────────────────────────▶ engines    frozen requests go on, their KV recomputed

After a failure every engine stays paused, and some may already hold the new weights: `form_group` again (without the
engines that are gone), call `sync_weights` again, and nothing was sampled from a mixture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from weight_sync.client import await_all
from weight_sync.protocols import EngineHandle, TransferReport, WeightLearner
from weight_sync.verify import WeightSyncError, problems_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SyncReport:
    version: int
    nbytes: int
    seconds: Mapping[str, float]
    """By phase: pause, send, verify, commit, resume."""

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def form_group(learner: WeightLearner, engines: Sequence[EngineHandle]) -> None:
    """(Re)connect the learner with `engines`. Needed once, and whenever an engine came, went, or a sync failed.

    Raises WeightSyncError naming who did not join."""
    learner.form_weight_group(engines)


def sync_weights(
    learner: WeightLearner, engines: Sequence[EngineHandle], version: int, *, timeout: float, verify: bool = True
) -> SyncReport:
    """Give all `engines` the learner's current weights, as `version`. `engines` are those of the formed group.

    Raises WeightSyncError saying which phase failed, at which engines, and why; the engines are then still paused."""
    seconds: dict[str, float] = {}

    def timed(phase: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = call()
        seconds[phase] = time.perf_counter() - start
        return result

    def everywhere(phase: str, call: Callable[[EngineHandle], Future[None]]) -> None:
        timed(phase, lambda: await_all(phase, {e.name: call(e) for e in engines}, timeout))

    everywhere("pause", lambda engine: engine.pause())
    report = timed("send", learner.send_weights)
    if verify:
        timed("verify", lambda: check_transfer(report, engines))
    everywhere("commit", lambda engine: engine.commit(version))
    everywhere("resume", lambda engine: engine.resume())
    return SyncReport(version, report.nbytes, seconds)


def check_transfer(report: TransferReport, engines: Sequence[EngineHandle]) -> None:
    """Raises WeightSyncError unless every engine received, took and applied exactly what was sent."""
    wrong: dict[str, str] = {}
    for engine in engines:
        received = report.received.get(engine.name)
        problem = "it did not take part" if received is None else problems_of(report.sent, received)
        if problem:
            wrong[engine.name] = problem
    if wrong:
        raise WeightSyncError("verify", tuple(wrong), "; ".join(f"{name}: {text}" for name, text in wrong.items()))
