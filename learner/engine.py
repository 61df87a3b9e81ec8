"""What a training engine must do. `DeepSpeedEngine` is the real one; `TorchEngine` is the readable reference.

LearnerWorker ──▶ TrainEngine.logprobs / train_step ──▶ PolicyModule.forward (inside the engine's wrapper)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vlm.batch import MultimodalBatch
from weight_sync.protocols import WeightSource

MicroLoss = Callable[[MultimodalBatch, Tensor, Tensor], tuple[Tensor, Mapping[str, float]]]
"""(micro-batch, logprobs [B, L], entropy [B, L]) -> (summed loss already divided by the *global* denominator, sums of
metrics). Entries outside `loss_mask` of both tensors are 0 and carry no gradient."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, reduced over all ranks."""

    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    metrics: Mapping[str, float]
    """Sums over all micro-batches and ranks of what the MicroLoss reported."""


@runtime_checkable
class TrainEngine(Protocol):
    """Owns the model, the optimizer and the process group of one learner rank. Collective: every rank calls the same
    method with the same number of micro-batches."""

    rank: int
    world_size: int

    def logprobs(self, batch: MultimodalBatch, *, reference: bool = False) -> Tensor:
        """float32 `[B, L]`, no gradient; under the frozen reference policy if `reference`."""

    def train_step(self, batches: Sequence[MultimodalBatch], micro_loss: MicroLoss) -> StepResult:
        """Forward and backward over every micro-batch, one optimizer step. Gradients are *summed* over micro-batches
        and ranks: the MicroLoss divides by global denominators."""

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]: ...

    def all_reduce_max(self, values: Sequence[float]) -> list[float]: ...

    def weight_source(self, bucket_bytes: int) -> WeightSource:
        """The current policy as the engines load it: their names, LoRA merged, gathered bucket by bucket."""

    def full_state(self) -> Mapping[str, Any]:
        """Rank 0: everything a resume needs, independent of the number of ranks (parameters in their own names,
        optimizer moments and step, scheduler, RNG). Other ranks: their RNG only. Collective."""

    def load_full_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `full_state` gave, on any number of ranks. Collective."""

    def save_pretrained(self, directory: Path) -> None:
        """Write Hugging Face format (and a peft adapter beside it, if one is trained). Collective."""
