"""Watchdog: a thread that tells the run's desk how the run stands, and the user why it is stuck when it is.

    every LOOK_SECONDS   the loop's status ─▶ desk ─▶ how many engines somebody wants ─▶ the loop
    no progress          probe everybody ─▶ why(status) ─▶ the terminal, once for each time that it happens

It is a thread, so that it sees a driver whose event loop is blocked too.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from saccade.fleet.pool import Pool
from saccade.fleet.probe import silent, store_shares
from saccade.fleet.waiting import complete
from saccade.pipeline.groups import Group, State
from saccade.pipeline.stuck import GOES_ON, GroupStatus, Status, why
from saccade.run import Run

LOOK_SECONDS = 2.0
ANSWER_SECONDS = 5.0
"""Seconds in which the loop must answer, and every process whether it lives."""


class Watchdog(threading.Thread):
    def __init__(self, run: Run, desk: Any, patience: float) -> None:
        """`patience`: seconds without progress after which the user is told. Start it within the run's event loop."""
        super().__init__(name="watchdog", daemon=True)
        self._run, self._desk, self._patience = run, desk, patience
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._ended = threading.Event()
        self._told = 0.0
        """When the user was told last that the run is stuck."""
        self._answered = time.monotonic()
        """When the loop answered last."""

    def run(self) -> None:
        wanted: Future[int | None] | None = None
        while not self._ended.wait(LOOK_SECONDS):
            try:
                status = self.look()
            except Exception:  # Ray or the loop is going down, and the run itself says so
                continue
            if self._ended.is_set():  # then the loop may have ended too, and is not blocked
                return
            if wanted is None or wanted.done():
                if wanted is not None and wanted.exception() is None and (engines := wanted.result()) is not None:
                    self._loop.call_soon_threadsafe(self._run.actors.scale, engines)
                wanted = self._desk.exchange.remote(status.to_dict()).future()
            if (status.idle > self._patience or status.blocked) and time.monotonic() - status.idle >= self._told:
                self._told = time.monotonic()
                self._run.display.phase(f"no progress: {why(status)}")

    def look(self) -> Status:
        """The status of now. Where nothing goes on, everybody is asked whether he lives."""
        answer: Future[Status] = Future()
        self._loop.call_soon_threadsafe(complete, answer, lambda: snapshot(self._run))
        try:
            status = answer.result(ANSWER_SECONDS)
        except TimeoutError:
            if answer.done():
                raise  # the snapshot's own
            idle = time.monotonic() - self._answered
            return Status(self._run.version, self._run.config.steps, *self._run.doing, idle, blocked=self._where())
        self._answered = time.monotonic()
        if status.idle > min(self._patience, GOES_ON):
            asked = self._run.actors.health()
            status = replace(status, silent=tuple(silent(asked, ANSWER_SECONDS)), stores=store_shares())
        return status

    def end(self) -> None:
        self._ended.set()

    def _where(self) -> str:
        """The line of ours at which the loop's thread stands."""
        frames = traceback.extract_stack(sys._current_frames().get(self._thread))
        at = f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}"
        return f"its event loop has not answered for {ANSWER_SECONDS:g} s; it is at {at}"


@asynccontextmanager
async def watched(run: Run) -> AsyncIterator[None]:
    """Watch over a run beside the body, if it has a desk."""
    if run.desk is None:
        yield
        return
    watchdog = Watchdog(run, run.desk, run.config.cluster.sync_timeout)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.end()


def snapshot(run: Run) -> Status:
    """The status of a run, as its loop sees it."""
    rollouts, actors = run.rollouts, run.actors
    doing, seconds = run.doing
    evaluation = run.evaluator if doing == "evaluate" else None
    groups = (rollouts if evaluation is None else evaluation).groups.all()
    progress = rollouts.progress if evaluation is None else max((group.since for group in groups), default=0.0)
    pools: tuple[Pool[Any], ...] = (actors.engines, actors.rewards, actors.data)
    issued = [group for group in groups if group.state is State.ISSUED]
    late = [group for group in issued if group.late]
    oldest = min(late or issued, key=lambda group: group.since, default=None)
    scored = sum(group.state is State.SCORED for group in groups)
    return Status(
        step=run.version,
        steps=run.config.steps,
        doing=doing,
        seconds=seconds,
        idle=min(seconds, time.monotonic() - progress),
        away=tuple(text for pool in pools for text in pool.describe()),
        groups={
            "issued": len(issued),
            "scored": scored,
            "sealed": len(groups) - len(issued) - scored,
        },
        oldest=None if oldest is None else group_status(oldest),
        prompts=rollouts.prompts.waiting(),
        enough_scored=scored >= rollouts.prompts_per_step,
        disk_free=shutil.disk_usage(run.directory).free,
        members=tuple(
            f"{m.name}: {m.state}, {m.groups} groups done, load {m.load} tokens, weights of step {m.version}"
            for m in actors.engines.members
        ),
    )


def group_status(group: Group) -> GroupStatus:
    """Who has a group that was issued."""
    waits_for, node = "an engine to serve", ""
    if group.sent is not None and group.scorer is not None:
        member = group.sent.member
        generated = member.actor.has_answered(group.sent.group)
        holder = group.scorer if generated else member
        waits_for, node = f"{holder.name} ({'scoring' if generated else 'generating'})", holder.node
    return GroupStatus(str(group.ref), waits_for, node, time.monotonic() - group.since, group.late)
