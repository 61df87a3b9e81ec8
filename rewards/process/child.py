"""The process that runs rewards: a fresh interpreter that worker.py starts and may kill at any time.

worker ── Setup ──▶ child           (imports, warms up)       child ── ("ready", Traits) or ("failed", why) ──▶
worker ── ScoringRequest ──▶ child                            child ── ("scored", Scores) ──▶ and again
                                    meanwhile, for a service   child ── ("call", name, arguments) ──▶
worker ── ("done", result) or ("transient" or "failed", why) ──▶ child
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.base import ServiceError, TransientError
from rewards.compose import describe
from rewards.config import RewardSpec
from rewards.process.channel import Channel
from rewards.registry import build_rewards

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of a child process."""

    specs: Sequence[RewardSpec]
    services: tuple[str, ...]
    """Names of the services that the worker offers."""
    memory: int | None
    """Memory limit of the child's data in bytes; None: no limit."""


@dataclass(frozen=True, slots=True)
class Traits:
    """Properties of the loaded rewards that the worker has to know."""

    needs_media: bool
    separable: bool


@dataclass(frozen=True, slots=True)
class _Remote:
    """A service as rewards see it; the worker executes it."""

    channel: Channel
    name: str

    def __call__(self, *arguments: Any) -> Any:
        self.channel.send(("call", self.name, arguments))
        status, result = self.channel.receive()
        if status != "done":
            raise (TransientError if status == "transient" else ServiceError)(result)
        return result


def serve(descriptor: int, parent: int) -> None:
    """Score the requests that arrive at the socket `descriptor`, until process `parent` closes it or dies."""
    _die_with(parent)
    faulthandler.enable()  # a crash in native code leaves its Python stack in the log
    os.set_inheritable(descriptor, False)  # a program that a reward starts must not keep the channel open
    channel = Channel(socket.socket(fileno=descriptor))
    setup: Setup = channel.receive()
    _limit_memory(setup.memory)
    try:
        reward = build_rewards(setup.specs)
        reward.connect({name: _Remote(channel, name) for name in setup.services})
        reward.warm_up()
    except (Exception, SystemExit) as error:
        channel.send(("failed", describe(error)))
        return
    channel.send(("ready", Traits(reward.needs_media, reward.separable)))
    while True:
        try:
            request = channel.receive()
        except (EOFError, ConnectionError):
            return
        channel.send(("scored", reward.score(request)))


def _die_with(parent: int) -> None:
    """On Linux, let the kernel kill this process when its parent dies, whatever it is computing. Elsewhere the process
    ends when it next reads the closed channel."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _limit_memory(limit: int | None) -> None:
    """Make sure that this process fails, or is killed by the kernel, when memory runs out, and not an engine."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")
