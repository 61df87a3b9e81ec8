"""What a rollout engine must do. `VLLMEngine` is the real one; `SimulatedEngine` serves scale and fault tests.

RolloutActor ──▶ RolloutEngine.generate(prompt, sampling) ──▶ EngineOutput
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from rollout.types import Completion, Prompt
from vlm.media.types import Media

if TYPE_CHECKING:
    from weight_sync.verify import WeightReport

BAN = -100.0
"""Added to the logit of a banned token, by the engine and by the learner (learner.model.logprobs.BAN) alike."""

DEFAULT_MAX_SEQS, DEFAULT_GPU_SHARE = 256, 0.85
"""Of `EngineOptions.max_num_seqs` and `.gpu_memory_utilization`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. Training uses temperature alone, so that the learner can reproduce the distribution:
    softmax(logits / temperature) with the banned tokens' logits lowered by `BAN`."""

    n: int = 1
    """K, completions per prompt."""
    max_tokens: int = 512
    """Maximum new tokens of each completion."""
    temperature: float = 1.0
    """0 decodes greedily (evaluation only: its log-probabilities are not the policy's)."""
    seed: int | None = None
    """Seed of completion 0; completion k uses `seed + k`."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that must never be sampled: the adapter's media placeholders."""
    max_tokens_each: tuple[int, ...] = ()
    """Per-completion maxima (benchmarks with forced lengths); empty: `max_tokens` for all."""


class EngineDeadError(RuntimeError):
    """The engine cannot serve any further request and must be started again."""


class PromptRefusedError(ValueError):
    """The engine refuses this prompt (too long, unreadable media): the prompt is at fault, not the engine."""


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """All K completions of one prompt."""

    prompt_token_ids: np.ndarray
    """int32 `[T]`, expanded."""
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is started with."""

    model: str
    dtype: str = "bfloat16"
    max_model_len: int = 4096
    tensor_parallel_size: int = 1
    device: str = "cuda"
    """"cuda" or "cpu"; an engine refuses to start on a machine that lacks it."""
    threads: int = 1
    """OpenMP threads: of everything on CPU; beside a GPU, of what prepares images."""
    kv_cache_gib: float | None = None
    """KV cache in GiB; None: what is left of the engine's share of a GPU, or 1 GiB (CPU)."""
    max_media_per_prompt: Mapping[str, int] = field(default_factory=lambda: {"image": 8})
    """By kind."""
    weight_transfer_backend: str | None = None
    """"nccl", "gloo", ...; None for an engine whose weights never change (evaluation from disk)."""
    seed: int = 0
    trust_remote_code: bool = False
    start_timeout: float = 600.0
    """Seconds in which the engine must be ready."""
    control_timeout: float = 300.0
    """Seconds that any call but `start` and `generate` may take, receiving weights included."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of vLLM's `AsyncEngineArgs`, as they are."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at once."""
        return int(self.extra.get("max_num_seqs", DEFAULT_MAX_SEQS))

    @property
    def gpu_memory_utilization(self) -> float:
        """GPU: share of its memory that must be free at the start, and that the engine takes if `kv_cache_gib` is
        None."""
        return float(self.extra.get("gpu_memory_utilization", DEFAULT_GPU_SHARE))


@runtime_checkable
class RolloutEngine(Protocol):
    """One policy server. Every method may be awaited concurrently; none may wait without a limit."""

    async def start(self) -> None:
        """Load the model. Raises RuntimeError with the engine's own log tail when it cannot."""

    async def generate(self, prompt: Prompt, media: Sequence[Media], sampling: SamplingParams) -> EngineOutput:
        """Sample K completions. `media` is `prompt.media` with `data` resolved to bytes.

        Raises EngineDeadError or PromptRefusedError."""

    async def init_weight_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Join the weight-transfer group described by `init_info`; joining again replaces the former group."""

    async def pause(self) -> None:
        """Freeze running requests (they are kept) and drop every cache computed from the weights."""

    async def receive_weights(self, update_info: Mapping[str, Any]) -> WeightReport:
        """Receive and load one full set of weights while paused; says what arrived and whether all of it was used."""

    async def commit(self, version: int) -> None:
        """Name the weights just received; tokens sampled from now on carry `version`."""

    async def resume(self) -> None: ...

    def queued(self) -> int:
        """Completions asked for and not finished: waiting, frozen or running."""
        ...

    async def version(self) -> int: ...

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine is gone."""

    async def shutdown(self) -> None: ...
