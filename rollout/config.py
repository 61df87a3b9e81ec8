"""The section `rollout`: engines, and how completions are sampled."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from vlm.section import After, section


def _sizes_are_numbers(options: dict[str, Any]) -> dict[str, Any]:
    for name in ("max_num_seqs", "gpu_memory_utilization"):
        value = options.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} should be a number, not {value!r}")
    parallel = options.get("tensor_parallel_size", 1)
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise ValueError(f"tensor_parallel_size should be a whole number of GPUs, not {parallel!r}")
    return options


@section
class RolloutConfig:
    engines: Annotated[int, Ge(1)] = 1
    """Number of rollout actors, each with an engine of its own."""
    num_generations: Annotated[int, Ge(1)] = 8
    """K, completions per prompt."""
    max_completion_length: Annotated[int, Ge(1)] = 512
    """Maximum new tokens per completion."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Sampling temperature; the learner divides its logits by it too."""
    max_staleness: Annotated[int, Ge(0)] = 1
    """Policy versions that a token may lag behind the weights it trains; 0 is strictly on-policy, 1 overlaps generation
    of the next batch with training of this one."""
    admission: Literal["auto", "strict", "windowed"] = "auto"
    """Groups of a batch: those that were admitted for it (strict), or the first that are scored, so that a long
    completion holds nobody up (windowed). auto: windowed with max_staleness > 0."""
    kv_cache_gib: Annotated[float, Gt(0)] | None = None
    """KV cache in GiB; default: what is left of the engine's share of a GPU (engine_options.gpu_memory_utilization),
    on CPU 1 GiB."""
    engine_options: Annotated[dict[str, Any], After(_sizes_are_numbers)] = field(default_factory=dict)
    """Further options of vLLM's AsyncEngineArgs, by vLLM's names: tensor_parallel_size (GPUs of one engine),
    max_num_seqs (256 here), gpu_memory_utilization (0.85 here: the share of a GPU that must be free when an engine
    starts, and that it takes), enforce_eager, ..."""

    @property
    def windowed(self) -> bool:
        """Return whether a batch consists of the first groups that are scored."""
        return self.admission == "windowed" or (self.admission == "auto" and self.max_staleness > 0)

    @property
    def tensor_parallel_size(self) -> int:
        """Return the number of GPUs of one engine."""
        return int(self.engine_options.get("tensor_parallel_size", 1))

    @property
    def max_num_seqs(self) -> int:
        """Return how many sequences an engine runs at once."""
        return int(self.engine_options.get("max_num_seqs", 256))

    @property
    def gpu_memory_utilization(self) -> float:
        """Return the share of a GPU's memory that must be free when an engine starts, and that it takes if
        `kv_cache_gib` is None."""
        return float(self.engine_options.get("gpu_memory_utilization", 0.85))
