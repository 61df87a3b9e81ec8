"""PromptStream: the prompts of a run in their order, those left out that are not worth a step.

data actor ─▶ take ─▶ Difficulty admits it? ─▶ the ledger
     └─ lost ─▶ its replacement goes on behind the last prompt that arrived here
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rollout.types import GroupSummary, PromptRef, StoredPrompt
from saccade.errors import RunError
from saccade.fleet.pool import Member, MemberState, Pool
from saccade.fleet.protocols import Data
from saccade.fleet.waiting import CALL_TIMEOUT, awaited
from saccade.pipeline.difficulty import Difficulty

MOST_PASSED_OVER = 1000
"""Prompts looked at for each that is taken, before a run is taken for finished."""


T = TypeVar("T")
Cursor = dict[str, Any]


def _take(data: Data, count: int) -> Future[tuple[list[StoredPrompt], Cursor]]:
    return data.take(count)


@dataclass
class PromptStream:
    data: Pool[Any]
    """The data actor."""
    timeout: float
    """Seconds to wait for prompts."""
    difficulty: Difficulty | None = None
    """Passes over prompts; None passes over none."""
    passed_over: int = 0
    """Prompts passed over since the last one that was taken."""
    _asked: float | None = None
    """When the data actor was asked for what has not arrived, on the clock of `time.monotonic`."""
    cursor: Cursor | None = None
    """Where the data stand behind the last prompt that `take` returned; None at their beginning."""
    _arrived: Cursor | None = None
    """The same behind the last prompt that arrived here."""

    async def take(self, count: int) -> list[StoredPrompt]:
        """The next prompts that are worth it. Raises RunError when hardly any is."""
        taken: list[StoredPrompt] = []
        looked_at = 0
        while len(taken) < count:
            if looked_at > MOST_PASSED_OVER * count:
                raise RunError(
                    f"{looked_at - len(taken)} prompts in a row have a mean reward outside algorithm.reward_range: "
                    "widen it, or end the run"
                )
            missing = count - len(taken)
            answer = await self.ask(partial(_take, count=missing), "the next prompts")
            prompts, self._arrived = answer
            looked_at += missing
            for prompt in prompts:
                if self.difficulty is None or self.difficulty.admits(prompt.ref):
                    taken.append(prompt)
                    self.passed_over = 0
                else:
                    self.difficulty.passed_over += 1
                    self.passed_over += 1
        self.cursor = self._arrived  # not before: where an error ends this, a resume hands out all of it again
        return taken

    def waiting(self) -> str:
        """Say what prompts are waited for; empty if none are awaited."""
        if self._asked is None:
            return ""
        filtered = f"; {self.passed_over} in a row are outside algorithm.reward_range" if self.passed_over else ""
        return f"the data actor was asked {time.monotonic() - self._asked:.0f} s ago{filtered}"

    async def read(self, refs: Sequence[PromptRef]) -> list[StoredPrompt]:
        """These prompts again."""
        return await self.ask(lambda data: data.read(refs), "prompts in flight (cluster.timeout)")

    async def renew(self, member: Member[Any]) -> None:
        """Let a data actor that has started go on where the one before it was. Raises RunError."""
        await awaited(member.actor.load_state(self._arrived), CALL_TIMEOUT, "the data cursor to be set")
        self.data.enter(member, MemberState.SERVING)

    async def ask(self, call: Callable[[Data], Future[T]], what: str) -> T:
        """Return the answer of the data actor, or of its replacement."""
        self._asked = time.monotonic()
        try:
            while True:
                await self.data.serves()
                member = self.data.serving[0]
                try:
                    result = await awaited(call(member.actor), self.timeout, what)
                except RunError as error:
                    if getattr(error.__cause__, "actor_id", None) != member.actor.id:
                        raise
                    self.data.lose(member, str(error))
                else:
                    member.groups += 1
                    return result
        finally:
            self._asked = None

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Learn from scored groups how difficult their prompts are."""
        if self.difficulty is not None:
            for summary in summaries:
                self.difficulty.observe(summary)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the cursor behind the last prompt that was taken, and the difficulties."""
        return {"cursor": self.cursor, "difficulty": None if self.difficulty is None else self.difficulty.state()}

    async def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue as of `state`."""
        self.cursor = self._arrived = cursor = state["cursor"]
        await self.ask(lambda data: data.load_state(cursor), "the data cursor to be set")
        if self.difficulty is not None:
            self.difficulty.load_state(state["difficulty"] or {"passed_over": 0, "totals": {}})
