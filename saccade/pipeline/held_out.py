"""HeldOut: the held-out prompts, whose contents are with the data actor that read them.

data actor ─▶ held-out prompts ─▶ Evaluator
     └─ lost ─▶ its replacement reads them again before the next attempt
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rollout.types import StoredPrompt
from saccade.pipeline.prompt_stream import PromptStream

Named = Sequence[tuple[StoredPrompt, str]]
"""Prompts, each with the name of its group in the results."""


class HeldOut:
    def __init__(self, stream: PromptStream, limit: int | None, group_by: str | None, prompts: Named) -> None:
        """`prompts` are those that the data actor returned for `limit` and `group_by`."""
        self._stream, self._limit, self._group_by, self._prompts = stream, limit, group_by, prompts
        self._owner = self._of()
        self._reading = asyncio.Lock()

    async def __call__(self) -> Named:
        """The prompts, read again if the data actor that read them is gone. Raises RunError."""
        async with self._reading:
            await self._stream.ask(lambda data: data.check_health(), "a sign of life of the data actor")
            if self._of() != self._owner:
                limit, group_by = self._limit, self._group_by
                again = await self._stream.ask(lambda data: data.held_out(limit, group_by), "the held-out prompts")
                self._prompts, self._owner = again, self._of()
            return self._prompts

    def _of(self) -> str:
        actor_id: str = self._stream.data.serving[0].actor.id
        return actor_id
