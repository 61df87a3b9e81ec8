"""EngineFleet: the weights that the engines of a run hold, and who joins them.

    step:   [ update ─ sync ]       [ update ─ sync ]            the learner's turn is one call's at a time:
    join:                    [ sync ]                            who has started comes in between two steps

An engine that comes back waits for the learner's turn, joins a new transfer group together with all others, and serves
once it holds exactly the weights that the others hold (`weight_sync/sync.py` compares).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from saccade.fleet.pool import EnginePool, Member, MemberState
from saccade.fleet.protocols import Learner
from saccade.fleet.waiting import in_thread
from weight_sync.protocols import SyncTimes
from weight_sync.sync import sync_weights
from weight_sync.verify import WeightMismatchError, WeightSyncError

HOLDS_WEIGHTS = (MemberState.SYNCING, MemberState.SERVING, MemberState.DRAINING)


class EngineFleet:
    def __init__(self, pool: EnginePool[Any], learner: Learner | None, timeout: float) -> None:
        """`learner` is None where nothing is trained: engines keep the weights with which they started. `timeout`:
        seconds in which each call of a sync must end."""
        self.pool, self.learner, self._timeout = pool, learner, timeout
        self.turn = asyncio.Lock()
        """Held by who uses the learner."""
        self.version = 0
        """The version of the learner's weights."""
        self._group: Sequence[Member[Any]] = ()
        """The members of the transfer group that stands."""
        self.times: SyncTimes | None = None
        """Where the time of the last sync went."""
        self._syncing = False
        self._synced = 0.0

    async def sync(self, version: int) -> None:
        """Give every engine that is ready the learner's weights, as `version`. An engine that fails in it is lost, and
        the others get them again; one that is not ready gets them when it joins.

        Raises WeightSyncError where the fault is not an engine's, or an engine holds what was not sent."""
        async with self.turn:
            self.version = version
            await self._sync()

    def renew(self, learner: Learner) -> None:
        """Let `learner` send the weights from now on. Call this in the learner's turn."""
        self.learner, self._group = learner, ()

    async def join(self, member: Member[Any]) -> None:
        """Let a member serve that has started."""
        if self.learner is None:
            self.pool.enter(member, MemberState.SERVING)
            return
        self.pool.enter(member, MemberState.SYNCING)
        async with self.turn:
            if member.state is MemberState.SYNCING:  # or the sync of a step took it along
                syncing = asyncio.ensure_future(self._sync())
                try:
                    await asyncio.shield(syncing)
                finally:
                    await asyncio.wait([syncing])  # who waits may be cancelled: the turn ends with the transfer

    def excused(self, since: float) -> bool:
        """Whether an engine may have been silent since then because it received weights."""
        return self._syncing or self._synced > since

    async def _sync(self) -> None:
        self._syncing = True
        try:
            while ready := [m for m in self.pool.members if m.state in HOLDS_WEIGHTS]:
                try:
                    await in_thread(lambda ready=ready: self._send(ready))  # type: ignore[misc]
                except WeightSyncError as error:
                    self._group = ()
                    blamed = [m for m in ready if m.name in error.engines]
                    if isinstance(error, WeightMismatchError) or not blamed:
                        raise
                    for member in blamed:
                        self.pool.lose(member, str(error))
                    continue
                for member in ready:
                    member.version = self.version
                    if member.state is MemberState.SYNCING:
                        self.pool.enter(member, MemberState.SERVING)
                return
        finally:
            self._syncing, self._synced = False, time.monotonic()

    def _send(self, members: Sequence[Member[Any]]) -> None:
        assert self.learner is not None
        engines = [member.actor for member in members]
        if list(members) != list(self._group):
            self.learner.form_weight_group(engines)
            self._group = members
        self.times = sync_weights(self.learner, engines, self.version, timeout=self._timeout)
