"""Waiting for calls, with and without an event loop."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from saccade.errors import RunError
from saccade.fleet.waiting import awaited, in_thread, to_end, wait_for


async def twice(value: int) -> int:
    await asyncio.sleep(0)
    if value < 0:
        raise RunError("negative")
    return 2 * value


def test_work_runs_to_its_end_whether_an_event_loop_runs_or_not() -> None:
    async def within(value: int) -> int:
        return to_end(twice(value))

    assert to_end(twice(3)) == asyncio.run(within(3)) == 6
    with pytest.raises(RunError, match="negative"):
        to_end(twice(-1))
    with pytest.raises(RunError, match="negative"):
        asyncio.run(within(-1))


def test_what_blocks_leaves_the_event_loop_free_and_ends_whoever_waits() -> None:
    go, ended = threading.Event(), threading.Event()

    def work() -> str:
        assert go.wait(60)
        ended.set()
        return "done"

    async def main() -> str:
        given_up = asyncio.create_task(in_thread(work))
        await asyncio.sleep(0)
        given_up.cancel()
        go.set()
        return await in_thread(lambda: "beside" if ended.wait(60) else "never")

    assert asyncio.run(main()) == "beside"


def test_a_call_that_does_not_end_or_fails_is_named() -> None:
    broken: Future[int] = Future()
    broken.set_exception(ValueError("no such row"))
    for wait in (wait_for, lambda *given: asyncio.run(awaited(*given))):
        with pytest.raises(RunError, match=r"waited 0.01 s for the next prompts"):
            wait(Future(), 0.01, "the next prompts")
        with pytest.raises(RunError, match="while waiting for the next prompts: no such row"):
            wait(broken, 60.0, "the next prompts")
