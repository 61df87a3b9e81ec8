"""Environment: one episode of a policy against something that answers. Single use: make, run one episode, discard.

A single-turn environment asks once. One with tools or images of its own appends further segments to a completion.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.engines.protocol import EngineOutput, SamplingParams
from rollout.types import Prompt
from vlm.media.types import Media

Generate = Callable[[Prompt, Sequence[Media], SamplingParams], Awaitable[EngineOutput]]
"""What an environment sees of an engine: `RolloutEngine.generate`."""


class Environment(Protocol):
    async def run(self, generate: Generate, sampling: SamplingParams) -> EngineOutput:
        """Play the episode to its end, `sampling.n` times side by side, and return all completions."""


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """The prompt, and the policy's one answer to it."""

    prompt: Prompt
    media: Sequence[Media]
    """`prompt.media` with `data` resolved to bytes."""

    async def run(self, generate: Generate, sampling: SamplingParams) -> EngineOutput:
        return await generate(self.prompt, self.media, sampling)
