"""The contract of a training engine. `DeepSpeedEngine` is the real one; `TorchEngine` is the readable reference.

LearnerWorker ──▶ learner/update.py ──▶ TrainEngine.logprobs / train_step ──▶ PolicyModule.forward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from learner.algorithm.objective import MISMATCH, LossTerms, token_means
from learner.model.cached import Cached
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind
from weight_sync.protocols import WeightSource

MicroLoss = Callable[[MultimodalBatch, Tensor, Tensor], LossTerms]
"""(micro-batch, logprobs [B, L], entropy [B, L]) -> its part of the loss, already divided by the *global* denominator,
and sums and maxima to report. Entries outside `loss_mask` of both tensors are 0 and carry no gradient."""

ReadTensor = Callable[[str, Sequence[int]], Tensor]
"""(name, shape it must have) -> the whole tensor."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, reduced over all micro-batches and ranks."""

    loss: float
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    sums: Mapping[str, float]
    maxima: Mapping[str, float]
    taken: bool = True
    """False where the loss or the gradient was not finite, the same on every rank: weights, moments and the count of
    steps are as they were."""
    not_finite: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """Where the step was not taken: micro-batch of this rank -> its terms that are not finite."""


@runtime_checkable
class TrainEngine(Protocol):
    """Owns the model and the optimizer of one learner rank. Collective: every rank calls the same methods in the same
    order, with the same number of micro-batches."""

    rank: int
    world_size: int
    steps: int
    """Optimizer steps taken, resumed ones included. Decides the learning rate."""

    def logprobs(self, batch: MultimodalBatch, *, reference: bool = False) -> Tensor:
        """float32 `[B, L]` on the CPU, no gradient; under the frozen reference policy if `reference`.

        Raises RuntimeError if a reference is asked for that the options did not load."""

    def run_towers(self, batch: MultimodalBatch) -> dict[MediaKind, list[FeatureRow]]:
        """Compute the values of the batch's media that will be cached, by kind and row, on the CPU. The language model
        does not run. The tensors have a gradient if something in the tower is trained, which `cached` excludes. If
        tower outputs are wanted, the batch must hold exactly one item."""

    def cached(self) -> Mapping[MediaKind, Cached]:
        """Say what is cached of the media that the run may hold, by kind of tower (`learner.model.cached`)."""

    def media_cost(self) -> float:
        """Return the cost of the towers for a token of media, in tokens of the language model. Cached towers cost
        nothing."""

    def train_step(self, batches: Sequence[MultimodalBatch], micro_loss: MicroLoss) -> StepResult:
        """Forward and backward over every micro-batch, one optimizer step. Gradients are *summed* over micro-batches
        and ranks: the MicroLoss divides by global denominators. No step is taken where the loss or the gradient of any
        rank is not finite."""

    def refresh_reference(self) -> None:
        """Make the current policy the reference. Raises RuntimeError if none was loaded. Collective."""

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Element by element over ranks, in float64."""

    def all_reduce_max(self, values: Sequence[float]) -> list[float]: ...

    def weight_source(self, bucket_bytes: int) -> WeightSource:
        """The current policy as the engines load it: their names, LoRA merged, gathered bucket by bucket."""

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Trained parameters (float32, `param/NAME`), once a step was taken their optimizer moments (`exp_avg/NAME`,
        `exp_avg_sq/NAME`), and the weights of a reference that is refreshed (`reference/NAME`): whole and one by one,
        in an order that does not depend on the number of ranks. Collective: every rank iterates to the end; what a rank
        other than 0 is given may be anything."""

    def state_bytes(self) -> int:
        """Bytes that `state_tensors` takes in float32, without gathering anything."""

    def load_state_tensors(self, read: ReadTensor, steps: int) -> None:
        """Restore what `state_tensors` gave after `steps` optimizer steps. Collective; every rank reads."""

    def save_pretrained(self, directory: Path) -> None:
        """Write Hugging Face format (and a peft adapter beside it, if one is trained). Collective."""


class StepTotals:
    """Sums and maxima over the micro-batches of a step, kept on their device: reading each would wait for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._each: list[dict[str, Tensor]] = []

    def add(self, terms: LossTerms) -> None:
        self._each.append({"loss": terms.loss.detach(), **terms.sums})
        for name, value in self._each[-1].items():
            value = value.to(torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        for name, value in terms.maxima.items():
            value = value.to(torch.float64)
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def not_finite(self) -> dict[int, list[str]]:
        """Micro-batch -> names of its terms that are not finite; without those that are."""
        found = {i: [name for name, value in own.items() if not value.isfinite()] for i, own in enumerate(self._each)}
        return {i: names for i, names in found.items() if names}

    def reduce(self, engine: TrainEngine) -> tuple[float, dict[str, float], dict[str, float]]:
        """`(loss, sums, maxima)` over all ranks."""
        sums = dict(zip(self._sums, engine.all_reduce_sum(_read(self._sums)), strict=True))
        maxima = dict(zip(self._maxima, engine.all_reduce_max(_read(self._maxima)), strict=True))
        return sums.pop("loss"), sums, maxima


def step_metrics(results: Sequence[StepResult], tokens: Sequence[float], known: int) -> dict[str, float]:
    """Over all steps of an update, of `tokens` each. The mismatch is between the engines and the policy before the
    update, which only the first `known` steps have."""
    sums = {name: sum(r.sums[name] for r in results) for name in results[0].sums}
    maxima = {name: max(r.maxima[name] for r in results) for name in results[0].maxima}
    if known < len(results):
        share = sum(tokens) / sum(tokens[:known])
        sums |= {name: share * sum(r.sums[name] for r in results[:known]) for name in MISMATCH}
        maxima["mismatch_max"] = max(r.maxima["mismatch_max"] for r in results[:known])
    return {**token_means(sums, sum(tokens)), **maxima}


def _read(values: Mapping[str, Tensor]) -> list[float]:
    return torch.stack(list(values.values())).tolist() if values else []
