"""The Protocol of rollout engines. `VLLMEngine` is the real one; `SimulatedEngine` is for scale and fault tests.

RolloutActor ──▶ RolloutEngine.sample(prompt, media, sampling) ──▶ EngineOutput
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from rollout.config import RolloutConfig
from rollout.types import Completion, Prompt
from vlm.config import ModelConfig
from vlm.media.types import Media

if TYPE_CHECKING:
    from weight_sync.verify import WeightReport


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Options for sampling completions. Training uses only the temperature, so that the learner can reproduce the
    distribution: softmax(logits / temperature), with the logits of banned tokens lowered by `BAN`."""

    n: int = 1
    """K, the number of completions per prompt."""
    max_tokens: int = 512
    """Maximum new tokens of each completion."""
    temperature: float = 1.0
    """0 decodes greedily. This is for evaluation only, since its log-probabilities are not the policy's."""
    seed: int | None = None
    """Seed of completion 0; completion k uses `seed + k`."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that must never be sampled: the adapter's media placeholders."""
    max_tokens_each: tuple[int, ...] = ()
    """A maximum for each completion, for benchmarks with forced lengths. Empty: `max_tokens` for all."""


class EngineDeadError(RuntimeError):
    """The engine cannot serve any further request and must be started again."""


class PromptRefusedError(ValueError):
    """The engine refuses this prompt (too long, unreadable media). The fault is in the prompt, not in the engine."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """All K completions of one prompt."""

    prompt_token_ids: np.ndarray
    """int32 `[T]`, expanded."""
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options with which an engine starts: two sections, and what follows from several."""

    model: ModelConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    max_model_len: int = 4096
    """Most tokens of a prompt and its completion together."""
    device: str = "cuda"
    """"cuda" or "cpu"; an engine refuses to start on a machine that lacks it."""
    threads: int = 1
    """OpenMP threads: for everything on CPU, or, with a GPU, for the preparation of images."""
    max_media_per_prompt: Mapping[str, int] = field(default_factory=lambda: {"image": 8})
    """Kind -> the most items in one prompt."""
    weight_transfer_backend: str | None = None
    """"nccl", "gloo", ...; None for an engine whose weights never change (evaluation from disk)."""
    seed: int = 0
    start_timeout: float = 600.0
    """Seconds within which the engine must be ready."""
    control_timeout: float = 300.0
    """Seconds that any call except `start` and `sample` may take, including the receipt of weights."""


@runtime_checkable
class RolloutEngine(Protocol):
    """One policy server. All methods may be awaited concurrently, and none may wait without a limit."""

    async def start(self) -> None:
        """Load the model. If that fails, raises RuntimeError with the end of the engine's log."""

    async def sample(self, prompt: Prompt, media: Sequence[Media], sampling: SamplingParams) -> EngineOutput:
        """Sample K completions. `media` is `prompt.media` with `data` resolved to bytes.

        Raises EngineDeadError or PromptRefusedError."""

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Join the weight-transfer group that `init_info` describes. Joining again replaces the previous group."""

    async def pause(self) -> None:
        """Freeze running requests without losing them, and drop every cache that was computed from the weights."""

    async def receive_weights(self, update_info: Mapping[str, Any]) -> WeightReport:
        """Receive and load one full set of weights while paused. Returns what arrived and whether all of it was
        used."""

    async def commit(self, version: int) -> None:
        """Set the version of the received weights. Tokens sampled from now on carry `version`."""

    async def resume(self) -> None: ...

    def queued(self) -> int:
        """Completions that are requested and not finished: waiting, frozen or running."""
        ...

    async def version(self) -> int: ...

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine is gone."""

    async def shutdown(self) -> None: ...
