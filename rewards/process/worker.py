"""RewardWorker: runs rewards in their own process, under a time limit, and survives whatever they do.

score(request) ──▶ child, which is ready in advance
    answers in time     K verdicts
    is silent           killed with all its process group: `timeout`; the next child starts at once
    dies                `error` with exit status or signal; the next child starts at once
    asks for a service  it is called here, and the child told the result

A time-out or a death concerns all K completions. If the rewards are separable, each completion is then scored alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rewards.base import ScoringRequest, Service, TransientError
from rewards.compose import Scores, describe
from rewards.config import RewardSpec
from rewards.functions.user import RewardSetupError
from rewards.process.channel import Channel
from rewards.process.child import Setup, Traits
from rollout.types import Verdict
from vlm.import_path import ours_first

START_TIMEOUT = 600.0
"""Seconds for importing the rewards and warming them up: on a machine that is busy this takes minutes."""
_EXIT_TIMEOUT = 30.0
"""Seconds in which the kernel must end a process, including the time to write its core."""
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from rewards.process.child import serve
serve(int(sys.argv[2]), int(sys.argv[3]))
"""


class RewardWorker:
    """Scores one request at a time. Use it from one thread that lives as long as the worker: when the thread that
    started the child ends, the kernel treats that as the end of the parent."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        timeout: float,
        start_timeout: float = START_TIMEOUT,
        *,
        services: Mapping[str, Service] | None = None,
        memory: int | None = None,
    ) -> None:
        """Start the first child without waiting for it.

        Args:
            timeout: seconds that one call on one group may take.
            start_timeout: seconds that importing the rewards and warming them up may take.
            services: what rewards may call upon, by name.
            memory: bytes of data that the child may hold; default: half of what is free when it starts.
        """
        self._specs = tuple(specs)
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._services = dict(services or {})
        self._deaths = 0
        """Children that died while they scored."""
        self._memory = memory
        self.traits = Traits(needs_media=False, separable=False)
        """Properties of the rewards, once they are loaded."""
        self._process, self._channel = self._spawn()

    def start(self) -> None:
        """Wait until the child is ready. If the previous child failed to start, start another.

        Raises:
            RewardSetupError: the child cannot load the rewards; the message says why.
        """
        if not self._running:
            self._restart()
        try:
            self._await_ready()
        except RewardSetupError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Return the process id of the current child."""
        return self._process.pid

    def score(self, request: ScoringRequest) -> Scores:
        """Return K verdicts within the time limit of one call, plus the start of a new child after a failure. If each
        completion is then scored alone, with a K-th of the limit, it takes up to twice that; so it does if the child
        died, which somebody else may have killed, and completions cannot be scored alone."""
        count, deaths = len(request.completions), self._deaths
        result = self._attempt(request, self._timeout, "group")
        alone = count > 1 and self.traits.separable
        if self._deaths > deaths and not alone:
            result = self._attempt(request, self._timeout, "group")
        if isinstance(result, Scores):
            return result
        if not alone:
            return Scores((result,) * count, {})
        verdicts = []
        for k in range(count):
            result = self._attempt(request.alone(k), self._timeout / count, "completion")
            verdicts.append(result.verdicts[0] if isinstance(result, Scores) else result)
        return Scores(tuple(verdicts), {})

    def _attempt(self, request: ScoringRequest, timeout: float, what: str) -> Scores | Verdict:
        """Call the child once. Return its answer, or the reason why there is none."""
        try:
            self.start()
        except RewardSetupError as error:
            return Verdict("error", reason=str(error))
        deadline = time.monotonic() + timeout
        try:
            self._channel.send(request, deadline)
            while True:
                status, *content = self._channel.receive(deadline)
                if status == "scored":
                    scores: Scores = content[0]
                    return scores
                name, arguments = content
                self._channel.send(self._serve(name, arguments, deadline), deadline)
        except TimeoutError:
            self._restart()
            reason = f"the rewards took longer than {timeout:g} s for the {what}; their process was killed"
            return Verdict("timeout", reason=reason)
        except (EOFError, ConnectionError):
            reason = f"the reward process {self._end(grace=_EXIT_TIMEOUT)} while it scored the {what}"
            self._deaths += 1
            self._restart()
            return Verdict("error", reason=reason)
        except BaseException:  # interrupted: the pending answer must not be read as the next group's
            self._restart()
            raise

    def set_service(self, name: str, service: Service) -> None:
        """Let rewards call upon `service` from now on under `name`, which they could call upon before."""
        self._services[name] = service

    def _serve(self, name: str, arguments: Sequence[object], deadline: float) -> tuple[str, object]:
        """Call a service for the child."""
        try:
            return "done", self._services[name](*arguments, timeout=max(0.0, deadline - time.monotonic()))
        except TransientError as error:
            return "transient", str(error)
        except Exception as error:  # whatever the error is, the reward gets it
            return "failed", describe(error)

    def close(self) -> None:
        """End the child. Scoring again would start another."""
        self._end()

    def _spawn(self) -> tuple[subprocess.Popen[bytes], Channel]:
        """Start a child, which loads the rewards in the background. It is not a fork: this process may have threads,
        and a fork loses the threads but keeps their locks."""
        ours_first()  # the child gets this process's import path
        ours, theirs = socket.socketpair()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # its own process group, so that all its processes can be killed together
            )
        self._ready, self._running = False, True
        channel = Channel(ours)
        with contextlib.suppress(ConnectionError):  # it died already; the caller that waits for it will see why
            memory = self._memory if self._memory is not None else _half_of_free_memory()
            setup = Setup(self._specs, tuple(self._services), memory)
            channel.send(setup, time.monotonic() + self._start_timeout)
        return process, channel

    def _await_ready(self) -> None:
        if self._ready:
            return
        deadline = time.monotonic() + self._start_timeout
        try:
            status, detail = self._channel.receive(deadline)
        except TimeoutError:
            raise RewardSetupError(
                f"the reward process was not ready after {self._start_timeout:g} s; check what the modules of "
                "the rewards do at import"
            ) from None
        except (EOFError, ConnectionError):
            reason = f"the reward process {self._end(grace=_EXIT_TIMEOUT)} while it loaded the rewards"
            raise RewardSetupError(reason) from None
        if status != "ready":
            raise RewardSetupError(f"the reward process could not load the rewards: {detail}")
        self.traits = detail
        self._ready = True

    def _restart(self) -> None:
        """Replace the child by another one, which starts in the background."""
        self._end()
        self._process, self._channel = self._spawn()

    def _end(self, grace: float = 0.0) -> str:
        """Kill the child and all processes that it started, unless that was done already. If the child ended by itself
        within `grace` seconds, return how."""
        if not self._running:
            return "was ended"
        self._running = False
        self._channel.close()
        if grace:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        status = _describe_exit(self._process.returncode)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_EXIT_TIMEOUT)
        return status


def _half_of_free_memory() -> int | None:
    """Return half of the free memory in bytes, by the kernel's estimate; None if there is no estimate."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(free.split()[1]) * 1024 // 2
    return None


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit status {code}"
    hint = " (possibly out of memory)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
