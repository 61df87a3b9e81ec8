"""The process that runs rewards: a fresh interpreter, started by worker.py, which may kill it at any time.

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
from rewards.process.channel import Channel
from rewards.registry import RewardSpec, build_rewards

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """What a child is started with."""

    specs: Sequence[RewardSpec]
    services: tuple[str, ...]
    """Names of the services that the worker offers."""
    memory: int | None
    """Bytes of data that the child may hold; None: no limit."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What the worker has to know of the rewards that were loaded."""

    needs_media: bool
    separable: bool


@dataclass(frozen=True, slots=True)
class _Remote:
    """A service, as rewards see it: the worker carries it out."""

    channel: Channel
    name: str

    def __call__(self, *arguments: Any) -> Any:
        self.channel.send(("call", self.name, arguments))
        status, result = self.channel.receive()
        if status != "done":
            raise (TransientError if status == "transient" else ServiceError)(result)
        return result


def serve(descriptor: int, parent: int) -> None:
    """Scores what comes in over the socket `descriptor`, until process `parent` closes it or dies."""
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
    """On Linux the kernel kills this process when its parent dies, however hard it may be computing then. Elsewhere it
    ends when it next looks at the closed channel."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _limit_memory(limit: int | None) -> None:
    """Where memory runs out, it shall be this process that fails, or that the kernel picks, not an engine."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")
