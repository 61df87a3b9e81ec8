"""Waiting for calls of actors, with a limit and in words. A call is a `Future`, of Ray's or of a test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

from saccade.errors import RunError

T = TypeVar("T")

POLL_SECONDS = 1.0
CALL_TIMEOUT = 120.0
"""Seconds for calls that only move bookkeeping."""
INTERRUPTED_SECONDS = 60.0
"""Seconds that what was interrupted has to come to its end."""


def wait_for(call: Future[T], timeout: float, what: str) -> T:
    """The result of `call`. Raises RunError that says what it waited for, or why the call failed."""
    wait([call], timeout)
    return _result(call, timeout, what)


async def awaited(call: Future[T], timeout: float, what: str) -> T:
    """`wait_for` within an event loop."""
    waiting = asyncio.wrap_future(call)
    await asyncio.wait([waiting], timeout=timeout)
    if waiting.done() and not waiting.cancelled():
        waiting.exception()  # read here, raised by `_result` in our words
    return _result(call, timeout, what)


def _result(call: Future[T], timeout: float, what: str) -> T:
    if not call.done():
        raise RunError(f"waited {timeout:g} s for {what}")
    if (error := call.exception()) is not None:
        cause = getattr(error, "cause", None)  # what an actor raised, without Ray's traceback of it
        raise RunError(f"while waiting for {what}: {cause or first_lines(error, 1)}") from error
    return call.result()


async def answer(call: Future[T]) -> T:
    """The result of `call`, which goes on when the one who waits does not."""
    return await asyncio.shield(asyncio.wrap_future(call))


async def in_thread(work: Callable[[], T]) -> T:
    """Return or raise what `work` does, which blocks. It runs in a thread of its own, to its end, whoever waits."""
    call: Future[T] = Future()
    Thread(target=complete, args=(call, work), daemon=True).start()
    return await answer(call)


def to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end. Where an event loop runs already, as in a notebook, it gets a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    call: Future[T] = Future()
    begun: Future[Callable[[], Any]] = Future()

    async def interruptible() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        begun.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await work

    Thread(target=complete, args=(call, lambda: asyncio.run(interruptible())), daemon=True).start()
    try:
        return call.result()
    except KeyboardInterrupt:
        begun.result()()
        wait([call], INTERRUPTED_SECONDS)
        raise


def complete(call: Future[T], work: Callable[[], T]) -> None:
    """Do `work`, and complete `call` with what it returns or raises."""
    try:
        call.set_result(work())
    except BaseException as error:
        call.set_exception(error)


def first_lines(error: BaseException, count: int = 3) -> str:
    """The beginning of an error's text; of one from another process its own words, without the traceback."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return " / ".join(lines[:count])[:500] or type(cause).__name__
