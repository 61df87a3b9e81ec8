"""Tasks: coroutines that run beside the one who started them, tell it that something changed, and fail through it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """A set of tasks. `check` raises what one of them raised: whoever checks decides when a failure ends its work."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self.changed = asyncio.Event()
        """Set at the next `notify`, which puts another in its place: take it first, then look, then wait for it."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the caller."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)

    def notify(self) -> None:
        """Wake everybody who waits for `changed`."""
        self.changed.set()
        self.changed = asyncio.Event()

    def check(self) -> None:
        """Raises what a task raised first."""
        if self._failure is not None:
            raise self._failure

    async def cancel(self) -> None:
        """End all tasks."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            self.notify()
