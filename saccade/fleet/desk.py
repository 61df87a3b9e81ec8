"""Desk: where a run can be asked and told from outside, an actor with the run's folder as its name.

driver ── exchange(status) ──▶ Desk ◀── status() ────── saccade why-stuck
       ◀── engines wanted ──┘       ◀── scale(engines) ─ saccade scale

It ends with the driver. A driver that is blocked leaves its last status here, with the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from saccade.errors import RunError

NAMESPACE = "saccade"
ANSWER_SECONDS = 30.0


class Desk:
    def __init__(self) -> None:
        self._status: Mapping[str, Any] = {}
        self._told = time.time()
        self._engines: int | None = None

    def exchange(self, status: Mapping[str, Any]) -> int | None:
        """Keep the run's status. Returns how many engines somebody asked for since the last call, or None."""
        self._status, self._told = status, time.time()
        wanted, self._engines = self._engines, None
        return wanted

    def status(self) -> tuple[Mapping[str, Any], float]:
        """Return the last status, and how many seconds ago the run told it."""
        return self._status, time.time() - self._told

    def scale(self, engines: int) -> None:
        """Let the run have so many engines."""
        self._engines = engines


def open_desk(directory: Path) -> Any:
    """Ray's handle of a desk for the run in `directory`."""
    name = str(directory.absolute())
    return ray.remote(Desk).options(num_cpus=0, name=name, namespace=NAMESPACE, max_concurrency=4).remote()


def close_desk(desk: Any) -> None:
    """End a desk; the next run in its folder may open one of the same name then."""
    with suppress(Exception):  # Ray itself may be gone
        ray.kill(desk)


def find_desk(directory: Path | None) -> Any:
    """The desk of the run in `directory`, or of the only run of the cluster that this process has joined.

    Raises RunError naming the runs that there are."""
    named = ray.util.list_named_actors(all_namespaces=True)
    runs = sorted(entry["name"] for entry in named if entry["namespace"] == NAMESPACE)
    wanted = str(directory.absolute()) if directory is not None else runs[0] if len(runs) == 1 else None
    if wanted not in runs:
        there_are = f"the runs on this cluster: {', '.join(runs)}" if runs else "no run is on this cluster"
        asked = f"no run in {wanted}; " if wanted else "" if not runs else "name the run by its output_dir; "
        raise RunError(asked + there_are)
    return ray.get_actor(wanted, NAMESPACE)


def joined(address: str | None) -> None:
    """Join the cluster at `address`, by default the one on this machine. Raises RunError where there is none."""
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise RunError(f"no Ray to join at {address or 'this machine'} (--address host:port): {error}") from error


def ask_for(desk: Any, engines: int) -> None:
    """Ask a run through its desk to have so many engines."""
    ray.get(desk.scale.remote(engines), timeout=ANSWER_SECONDS)


def last_status(desk: Any) -> tuple[Mapping[str, Any], float]:
    """The status that a desk keeps, and its age in seconds."""
    status: tuple[Mapping[str, Any], float] = ray.get(desk.status.remote(), timeout=ANSWER_SECONDS)
    return status
