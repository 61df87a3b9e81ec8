"""sync_weights: one update of all rollout engines, in one function.

Learner and engines first join a transfer group, and again whenever an engine came, went, or a synchronisation failed:

    driver ── form_weight_group(engine handles) ─▶ learner, on every rank: WeightSender.form_group
    learner rank 0    opens a store at a new port, takes rank 0 of the group
           ── init_weight_transfer(host, port, first rank) ─▶ each engine ─▶ its workers take the ranks 1, 2, ...
    all meet in the store: one broadcast group (gloo or NCCL); the other learner ranks only take part in gathers

Then each update:

    driver ── pause ─────────────────────────────────▶ engines    running requests freeze; caches of old weights go
           ── send_weights ─▶ learner ── broadcast ──▶ engines    bucket by bucket; each side digests what it sees
           ── compare digests and load coverage
           ── commit(version) ───────────────────────▶ engines    tokens sampled from now on carry it
           ── resume ────────────────────────────────▶ engines    frozen requests continue, their KV is recomputed

After a failure every engine stays paused, and some may already hold the new weights. Form the group again (without the
engines that are gone) and call `sync_weights` again: nothing was sampled from a mixture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from weight_sync.client import await_all
from weight_sync.protocols import EngineHandle, SyncTimes, TransferReport, WeightLearner
from weight_sync.verify import WeightMismatchError, WeightSyncError, problems_of

COMPARING = "comparing the weights with those sent"


def sync_weights(learner: WeightLearner, engines: Sequence[EngineHandle], version: int, *, timeout: float) -> SyncTimes:
    """Give all `engines` the learner's current weights, as `version`. `engines` are those of the formed group.

    Raises WeightSyncError, which says which phase failed, at which engines, and why, and its WeightMismatchError if
    that is true of any engine in their place. The engines are then still paused."""

    def everywhere(phase: str, call: Callable[[EngineHandle], Future[None]]) -> None:
        await_all(phase, {engine.name: call(engine) for engine in engines}, timeout)

    paused = time.perf_counter()
    everywhere("pausing", lambda engine: engine.pause())
    report = learner.send_weights()
    sent = time.perf_counter()
    check_transfer(report, engines)
    checked = time.perf_counter()
    everywhere("committing the version", lambda engine: engine.commit(version))
    everywhere("resuming", lambda engine: engine.resume())
    received = report.received.values()
    return SyncTimes(
        pause=time.perf_counter() - paused,
        gather=report.gather_seconds,
        transfer=report.transfer_seconds,
        load=max((r.load_seconds for r in received), default=0.0),
        verify=report.verify_seconds + max((r.verify_seconds for r in received), default=0.0) + checked - sent,
    )


def check_transfer(report: TransferReport, engines: Sequence[EngineHandle]) -> None:
    """Raises WeightMismatchError unless every engine loaded and applied exactly what was sent, and WeightSyncError if
    one was not asked to."""
    names = [engine.name for engine in engines]
    wrong = {n: text for n in names if n in report.received and (text := problems_of(report.sent, report.received[n]))}
    if wrong:
        reasons = "; ".join(f"{name}: {text}" for name, text in wrong.items())
        raise WeightMismatchError(COMPARING, tuple(wrong), reasons)
    if absent := [name for name in names if name not in report.received]:
        reasons = "; ".join(f"{name}: it did not take part" for name in absent)
        raise WeightSyncError(COMPARING, absent, reasons)
