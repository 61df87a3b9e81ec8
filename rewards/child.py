"""The process that runs rewards: a fresh interpreter, started by rewards/worker.py, which may kill it at any time.

worker ── specs ──▶ child        (imports, warms up)      child ── ("ready", needs_media) or ("failed", why) ──▶
worker ── ScoringRequest ──▶ child                        child ── K Verdicts ──▶ ... until the channel closes
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import socket
import sys

from rewards.channel import Channel
from rewards.compose import describe
from rewards.registry import build_rewards

_PR_SET_PDEATHSIG = 1


def serve(descriptor: int, parent: int) -> None:
    """Scores what comes in over the socket `descriptor`, until process `parent` closes it or dies."""
    _die_with(parent)
    faulthandler.enable()  # a crash in native code leaves its Python stack in the log
    os.set_inheritable(descriptor, False)  # a program that a reward starts must not keep the channel open
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        reward = build_rewards(channel.receive())
        reward.warm_up()
    except (Exception, SystemExit) as error:
        channel.send(("failed", describe(error)))
        return
    channel.send(("ready", reward.needs_media))
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(reward(request))


def _die_with(parent: int) -> None:
    """On Linux the kernel kills this process when its parent dies, however hard it may be computing then. Elsewhere it
    ends when it next looks at the closed channel."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
