"""An actor of a run that dies as a test says. It imports next to nothing, so that it is there at once."""

from __future__ import annotations

import os
import signal


class Process:
    def pid(self) -> int:
        return os.getpid()

    def check_health(self, core: str) -> None:
        """Raise what the actor of an engine raises whose core is dead: `core` says how it died."""
        from rollout.engines.protocol import EngineDeadError

        if core != "lives":
            raise EngineDeadError(core)

    def read(self, path: str) -> None:
        """Wait until somebody writes to the pipe at `path`."""
        with open(path) as waiting:
            waiting.read()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, reason: str) -> None:
        """Raise what a rank says whose peer is gone."""
        raise RuntimeError(reason)
