"""Waiting for calls of actors, with a limit and in words. A call is a `Future`, of Ray's or of a test's."""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import TypeVar

from saccade.errors import RunError

T = TypeVar("T")

POLL_SECONDS = 1.0
CALL_TIMEOUT = 120.0
"""Seconds for calls that only move bookkeeping."""


def wait_for(call: Future[T], timeout: float, what: str) -> T:
    """The result of `call`. Raises RunError that says what it waited for, or why the call failed."""
    wait([call], timeout)
    if not call.done():
        raise RunError(f"waited {timeout:g} s for {what}")
    if (error := call.exception()) is not None:
        cause = getattr(error, "cause", None)  # what an actor raised, without Ray's traceback of it
        raise RunError(f"while waiting for {what}: {cause or first_lines(error, 1)}") from error
    return call.result()


def first_lines(error: BaseException, count: int = 3) -> str:
    """The beginning of an error's text; of one from another process its own words, without the traceback."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return " / ".join(lines[:count])[:500] or type(cause).__name__
