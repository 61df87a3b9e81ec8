"""Groups of a batch that start together in an engine, and who else keeps it paused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rollout.engines.protocol import EngineOutput, RolloutEngine


class Holds:
    """Who keeps an engine paused: groups that start together, and the driver while weights arrive. It resumes when
    nobody does any more."""

    def __init__(self) -> None:
        self._who: set[object] = set()

    async def pause(self, engine: RolloutEngine, who: object) -> None:
        self._who.add(who)
        try:
            await engine.pause()
        except BaseException:
            self._who.discard(who)
            raise

    async def resume(self, engine: RolloutEngine, who: object) -> None:
        self._who.discard(who)
        if not self._who:
            await engine.resume()


class JointStart:
    """Groups that start together: the engine stays paused until each of them waits in its queue, or has ended before.

    A batch that starts whole is scheduled alike in every rerun, so that its log-probabilities have the same bits."""

    def __init__(self, engine: RolloutEngine, holds: Holds, size: int, n: int, limit: float) -> None:
        """Wait for `size` groups of `n` completions; they let the engine go after `limit` seconds in any case."""
        self._engine, self._holds, self._size, self._n, self._limit = engine, holds, size, n, limit
        self.arrived = 0
        self._ended = 0
        self._paused = asyncio.ensure_future(holds.pause(engine, self))
        self._resumed = asyncio.ensure_future(self._resume_when_all_wait())

    async def run(self, sample: Callable[[], Awaitable[EngineOutput]]) -> EngineOutput:
        """Call `sample` while the engine is paused, and return its output. It raises what went wrong with the start
        itself too, since the group would wait in a paused engine."""
        output, _ = await asyncio.gather(self._one(sample), asyncio.shield(self._resumed))
        return output

    async def _one(self, sample: Callable[[], Awaitable[EngineOutput]]) -> EngineOutput:
        try:
            await asyncio.shield(self._paused)
            return await sample()
        finally:
            self._ended += 1

    async def _resume_when_all_wait(self) -> None:
        await self._paused
        try:
            await asyncio.wait_for(self._all_wait(), self._limit)
        finally:
            await self._holds.resume(self._engine, self)

    async def _all_wait(self) -> None:
        while self._engine.queued() < self._n * (self._size - self._ended):
            await asyncio.sleep(0.001)
