"""PromptStream: the prompts of a run in their order, those left out that are not worth a step.

data actor ─▶ take ─▶ Difficulty admits it? ─▶ the ledger
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.types import GroupSummary, PromptRef, StoredPrompt
from saccade.errors import RunError
from saccade.fleet.protocols import Data
from saccade.fleet.waiting import CALL_TIMEOUT, awaited, wait_for
from saccade.pipeline.difficulty import Difficulty

MOST_PASSED_OVER = 1000
"""Prompts looked at for each that is taken, before a run is taken for finished."""


@dataclass
class PromptStream:
    data: Data
    timeout: float
    """Seconds to wait for the next prompts."""
    difficulty: Difficulty | None = None
    """Passes over prompts; None passes over none."""

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
            prompts = await awaited(self.data.take(missing), self.timeout, "the next prompts")
            looked_at += missing
            for prompt in prompts:
                if self.difficulty is None or self.difficulty.admits(prompt.ref):
                    taken.append(prompt)
                else:
                    self.difficulty.passed_over += 1
        return taken

    def read(self, refs: Sequence[PromptRef], timeout: float) -> list[StoredPrompt]:
        """These prompts again. Raises RunError where that takes more than `timeout` seconds."""
        return wait_for(self.data.read(refs), timeout, "prompts in flight (cluster.timeout)")

    def observe(self, summaries: Sequence[GroupSummary]) -> None:
        """Learn from scored groups how difficult their prompts are."""
        if self.difficulty is not None:
            for summary in summaries:
                self.difficulty.observe(summary)

    async def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the cursor behind the last prompt that was taken, and the difficulties."""
        cursor = await awaited(self.data.state(), CALL_TIMEOUT, "the data cursor")
        return {"cursor": cursor, "difficulty": None if self.difficulty is None else self.difficulty.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue as of `state`."""
        wait_for(self.data.load_state(state["cursor"]), CALL_TIMEOUT, "the data cursor to be set")
        if self.difficulty is not None and state["difficulty"] is not None:
            self.difficulty.load_state(state["difficulty"])
