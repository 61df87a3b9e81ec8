"""The control plane of one transfer group: vLLM's `VLLMWeightSyncClient` over engine handles, with deadlines.

It differs from vLLM's own Ray client in two ways: independent engines get distinct ranks (vLLM gives all the same
`rank_offset`), and no call waits without a limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from itertools import accumulate
from typing import Any, TypeVar

from weight_sync.protocols import EngineHandle
from weight_sync.verify import WeightMismatchError, WeightReport, WeightSyncError

T = TypeVar("T")

HEALTH_SECONDS = 30.0
"""The limit of a health check after a failure. A living engine first puts its half-loaded model in order."""


def rank_offsets(workers: Sequence[int]) -> list[int]:
    """The first rank of each engine in the transfer group. The learner is rank 0; the engines follow one another."""
    return list(accumulate(workers, initial=1))[:-1]


def await_all(phase: str, futures: Mapping[str, Future[T]], timeout: float) -> dict[str, T]:
    """Return results by engine name. Raises WeightSyncError at the first failure, or if an engine is not done after
    `timeout` seconds; WeightMismatchError for the engines that raised one."""
    done, pending = wait(futures.values(), timeout=timeout, return_when=FIRST_EXCEPTION)
    failed = {
        name: _cause(error) for name, future in futures.items() if future in done and (error := future.exception())
    }
    if mismatched := {name: error for name, error in failed.items() if isinstance(error, WeightMismatchError)}:
        raise WeightMismatchError(phase, tuple(mismatched), _reasons(mismatched))
    if failed:
        raise WeightSyncError(phase, tuple(failed), _reasons(failed))
    if pending:
        late = tuple(name for name, future in futures.items() if future in pending)
        raise WeightSyncError(phase, late, f"no answer within {timeout:g} s")
    return {name: future.result() for name, future in futures.items()}


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "cause", None) or error  # Ray wraps what was raised in another process


def _reasons(failed: Mapping[str, BaseException]) -> str:
    return "; ".join(
        f"{name}: {error.reason if isinstance(error, WeightMismatchError) else f'{type(error).__name__}: {error}'}"
        for name, error in failed.items()
    )


class WeightSyncClient:
    """Drives all engines of a group side by side. Used by a trainer-side transport, on learner rank 0 only."""

    def __init__(self, engines: Sequence[EngineHandle], timeout: float) -> None:
        names = [engine.name for engine in engines]
        if not engines or len(set(names)) != len(names):
            raise ValueError(f"a transfer group needs engines with distinct names, got {names}")
        self.engines, self.timeout = tuple(engines), timeout
        self.offsets = rank_offsets([engine.workers for engine in engines])
        self.world_size = 1 + sum(engine.workers for engine in engines)
        self.reports: dict[str, WeightReport] = {}
        """Each engine's report of the last update."""
        self.failure: WeightSyncError | None = None
        """Why an engine did not receive the last update."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called as soon as an engine fails to receive. It ends a broadcast that waits for that engine."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every worker of every engine join. The `rank_offset` of `init_info` is replaced by the engine's own."""
        offset = {engine.name: first for engine, first in zip(self.engines, self.offsets, strict=True)}
        self._all(
            "joining the transfer group",
            lambda engine: engine.init_weight_transfer({**init_info, "rank_offset": offset[engine.name]}),
        )

    def shutdown_weight_transfer_engine(self) -> None:
        """Nothing to do: an engine leaves its group when it joins the next."""

    def start_weight_update(self) -> None:
        """Check that every engine is alive before a broadcast, which could wait for a dead one. The update itself
        starts inside `update_weights`, in one call, so that a dying sender leaves no engine with an open update."""
        self.reports, self.failure = {}, None
        self.check_health("the transfer")

    def check_health(self, before: str) -> None:
        """Raises WeightSyncError naming an engine that is not alive; `before`: what is to come."""
        self._all(f"checking its health before {before}", lambda engine: engine.check_health())

    def blamed(self, error: WeightSyncError) -> WeightSyncError:
        """`error` at the engines alone that are dead or hang, if any: with one of them, the transfer to the others ends
        too, and they may be the first to say so. Call this after the transport was shut down, which releases them."""
        if isinstance(error, WeightMismatchError):
            return error
        futures = {engine.name: engine.check_health() for engine in self.engines}
        limit = min(self.timeout, HEALTH_SECONDS)
        wait(futures.values(), timeout=limit)
        failed = {name: _cause(e) for name, future in futures.items() if future.done() and (e := future.exception())}
        silent = [name for name, future in futures.items() if not future.done()]
        if not failed and not silent:
            return error
        hangs = f"no answer to a health check within {limit:g} s"
        reasons = [text for text in (_reasons(failed), *(f"{name}: {hangs}" for name in silent)) if text]
        return WeightSyncError(error.phase, (*failed, *silent), "; ".join(reasons))

    def update_weights(self, update_info: Any) -> None:
        """Let all engines receive. Returns when all have received, digested and loaded the weights."""
        try:
            self.reports = self._all("receiving the weights", lambda engine: engine.receive_weights(update_info))
        except WeightSyncError as error:
            self.failure = error
            self.on_failure()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing to do: the engines finished in `update_weights`, and the version is committed after the check."""

    def _all(self, phase: str, call: Callable[[EngineHandle], Future[T]]) -> dict[str, T]:
        start = time.monotonic()
        futures: dict[str, Future[T]] = {}
        for engine in self.engines:
            futures[engine.name] = call(engine)
        return await_all(phase, futures, self.timeout - (time.monotonic() - start))
