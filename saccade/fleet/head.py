"""Ray's head service, the GCS: whether it still answers, and an orderly end of the run when it does not.

    silent for `patience` seconds  ─▶ check() raises HeadLostError, at the run's next safe point
    silent for nearly Ray's limit  ─▶ the process ends here, with our words: Ray would abort it with its own

Without the head no actor can be started or found, but those that run still answer each other: the state can be saved.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from saccade.errors import RunError
from saccade.observe.display import Display

RAY_LIMIT = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 (Ray's spelling)
"""Seconds of silence after which Ray aborts every process that is connected, this one too."""
RAY_MARGIN = 5.0
PROBE_SECONDS = 1.0
LOCAL_PATIENCE = 3.0
"""Seconds. Nobody starts the head of a local Ray again."""
JOINED_PATIENCE = RAY_LIMIT / 2
"""Seconds. A cluster may have a head that comes back (KubeRay with fault tolerance)."""


class HeadLostError(RunError):
    """Ray's head service is gone, and with it the cluster."""


OWN_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
"""Errors for which this process cannot ask; they say nothing about the head."""


class HeadWatch:
    """Watches the head at `address` (host:port) from a thread, as a context."""

    def __init__(
        self, address: str, display: Display, *, local: bool, limit: float = RAY_LIMIT - RAY_MARGIN, patience: float = 0
    ) -> None:
        """`limit`: seconds of silence after which this process is ended. `patience` is chosen by `local`, if 0."""
        self._address, self._display, self._limit = address, display, limit
        self.local = local
        """Whether this process started it, for this run."""
        self._patience = patience or (LOCAL_PATIENCE if local else JOINED_PATIENCE)
        again = "run the same command" if local else "restart Ray (ray start --head), then run the same command"
        self.text = (
            f"Ray's head service (gcs_server at {address}) died or cannot be reached, so the run's processes on Ray "
            f"are lost; {again} with --resume to continue from the newest checkpoint"
        )
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watches Ray's head", daemon=True)

    def __enter__(self) -> HeadWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raises HeadLostError once the head has been silent for too long."""
        if self.lost:
            raise HeadLostError(self.text)

    def gone(self) -> bool:
        """Find out whether the head is lost; asked when something else has failed."""
        end = time.monotonic() + self._patience
        while not self.lost and not self.answers():
            if time.monotonic() >= end:
                self.lost = True
            time.sleep(PROBE_SECONDS)
        return self.lost

    def answers(self) -> bool:
        """Whether the head takes a connection now."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
        except OSError as error:
            return error.errno in OWN_TROUBLE
        return True

    def _watch(self) -> None:
        silent_since: float | None = None
        while not self._stop.wait(PROBE_SECONDS):
            begin = time.monotonic()
            if self.answers():
                silent_since = None
                continue
            silent_since = begin if silent_since is None else silent_since
            silent = time.monotonic() - silent_since
            if not self.lost and silent >= self._patience:
                self.lost = True
                self._display.phase(f"Ray's head service at {self._address} is gone; the run saves its state if it can")
            if silent >= self._limit:
                end_process(self.text)


def end_process(text: str, leave: Callable[[int], None] = os._exit) -> None:
    """End this process, as Ray would within seconds, but with a text that says what happened."""
    sys.stdout.flush()
    sys.stderr.write(f"saccade: {text}\n")
    sys.stderr.flush()
    leave(1)


__all__ = ["HeadLostError", "HeadWatch"]
