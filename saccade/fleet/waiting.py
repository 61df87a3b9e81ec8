"""Waiting for actors, with a limit and in words."""

from __future__ import annotations

from typing import Any

import ray

from saccade.errors import RunError

POLL_SECONDS = 1.0


def wait_for(reference: ray.ObjectRef | list[ray.ObjectRef], timeout: float, what: str) -> Any:
    """`ray.get` with a limit that says what it waited for. Raises RunError."""
    try:
        return ray.get(reference, timeout=timeout)
    except ray.exceptions.GetTimeoutError as error:
        raise RunError(f"waited {timeout:g} s for {what}") from error
    except ray.exceptions.RayTaskError as error:
        raise RunError(f"while waiting for {what}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise RunError(f"while waiting for {what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
