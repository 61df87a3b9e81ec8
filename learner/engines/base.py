"""BaseEngine: what DeepSpeedEngine and TorchEngine have in common. Each of them adds how it steps and keeps its state.

BaseEngine.train_step ─▶ forward, micro_loss ─▶ _backward (own) ─▶ learning rate ─▶ _step (own) ─▶ StepResult
BaseEngine.state_tensors, load_state_tensors, refresh_reference ─▶ _read, _write (own), one tensor at a time
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner.algorithm.schedule import learning_rate
from learner.engines.export import save_policy
from learner.engines.optimizer import poisoned_unless_finite
from learner.engines.protocol import MicroLoss, ReadTensor, StepResult, StepTotals
from learner.model.cached import Cached
from learner.model.policy import PolicyModule
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind
from weight_sync.protocols import WeightSource
from weight_sync.source import PolicySource

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of its moments."""


class BaseEngine(ABC):
    """Implements `TrainEngine`, except for the abstract methods and the reductions over ranks.

    A subclass calls `_set_policy` in its constructor and sets `_module`, `_optimizer`, and `_reference` if it needs
    one."""

    rank = 0
    world_size = 1
    _module: Any
    """The policy as it is called: itself, or what wraps it."""
    _optimizer: torch.optim.Optimizer
    _reference: Any = None
    """The frozen reference policy as it is called; None where there is none, or where LoRA is switched off for it."""

    def __init__(self, options: LearnerOptions, adapter: MultimodalAdapter, device: str) -> None:
        self.options, self.adapter = options, adapter
        self.steps = 0
        self._device = device

    def _set_policy(self, policy: PolicyModule) -> None:
        self.policy = policy
        self._trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------ what the engines do differently

    @abstractmethod
    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Add element by element over ranks, in float64."""

    @abstractmethod
    def all_reduce_max(self, values: Sequence[float]) -> list[float]: ...

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, summed over ranks."""

    @abstractmethod
    def _step(self) -> tuple[bool, float]:
        """Take an optimizer step and forget the gradients. Returns whether it was taken, and the norm of all gradients
        before clipping. It is not taken where that norm is not finite."""

    @abstractmethod
    def _restart_optimizer(self, steps: int) -> None:
        """Make the optimizer one that took `steps` steps. Its moments are written afterwards."""

    @abstractmethod
    def _read(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """The whole weight of a trained parameter, or its moment of that name (one of MOMENTS)."""

    @abstractmethod
    def _write(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Set what `_read` reads."""

    @abstractmethod
    def _read_reference(self, parameter: nn.Parameter) -> Tensor:
        """The whole weight of a parameter of the reference."""

    @abstractmethod
    def _write_reference(self, parameter: nn.Parameter, value: Tensor) -> None: ...

    # ------------------------------------------------------------------ what they share

    @torch.no_grad()
    def logprobs(self, batch: MultimodalBatch, *, reference: bool = False) -> Tensor:
        batch = self._place(batch)
        if reference and self.options.model.lora is not None:
            return self._module(batch, reference=True)[0].cpu()
        module = self._reference if reference else self._module
        if module is None:
            raise RuntimeError("no reference policy was loaded: the options have no KL")
        return module(batch)[0].cpu()

    def run_towers(self, batch: MultimodalBatch) -> dict[MediaKind, list[FeatureRow]]:
        features: Mapping[MediaKind, Sequence[FeatureRow]] = self._module(self._place(batch), towers_only=True)
        return {kind: [tuple(tensor.cpu() for tensor in row) for row in rows] for kind, rows in features.items()}

    def cached(self) -> Mapping[MediaKind, Cached]:
        return self.policy.cached

    def media_cost(self) -> float:
        return self.policy.media_cost

    def train_step(self, batches: Sequence[MultimodalBatch], micro_loss: MicroLoss) -> StepResult:
        totals = StepTotals()
        for batch in batches:
            batch = self._place(batch)
            terms = micro_loss(batch, *self._module(batch))
            self._backward(poisoned_unless_finite(terms.loss))
            totals.add(terms)
        rate = learning_rate(self.steps, self.options)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        taken, norm = self._step()
        self.steps += taken
        loss, sums, maxima = totals.reduce(self)
        return StepResult(loss, norm, rate, sums, maxima, taken, {} if taken else totals.not_finite())

    def refresh_reference(self) -> None:
        for name, reference in self._refreshed():
            self._write_reference(reference, self._read(self._trained[name]))

    def weight_source(self, bucket_bytes: int) -> WeightSource:
        return PolicySource(self.policy.model, rename=self.adapter.engine_weight_name, bucket_bytes=bucket_bytes)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained.items():
            yield f"param/{name}", self._read(parameter)
            for moment in MOMENTS if self.steps else ():
                yield f"{moment}/{name}", self._read(parameter, moment)
        for name, parameter in self._refreshed():
            yield f"reference/{name}", self._read_reference(parameter)

    def state_bytes(self) -> int:
        trained = sum(_full_shape(p).numel() for p in self._trained.values())
        return 4 * trained * (1 + (len(MOMENTS) if self.steps else 0) + bool(self.options.algorithm.reference_every))

    def load_state_tensors(self, read: ReadTensor, steps: int) -> None:
        self.steps = steps
        self._restart_optimizer(steps)
        for name, parameter in self._trained.items():
            shape = _full_shape(parameter)
            self._write(parameter, None, read(f"param/{name}", shape))
            for moment in MOMENTS if steps else ():
                self._write(parameter, moment, read(f"{moment}/{name}", shape))
        for name, parameter in self._refreshed():
            self._write_reference(parameter, read(f"reference/{name}", _full_shape(parameter)))

    def save_pretrained(self, directory: Path) -> None:
        save_policy(self.policy, self.adapter, directory, rank=self.rank)

    def _refreshed(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The reference's copies of trained parameters, if they are ever set."""
        if self.options.algorithm.reference_every:
            if self._reference is None:
                raise RuntimeError("no reference policy was loaded that could be refreshed")
            policy = getattr(self._reference, "module", self._reference)
            named = dict(policy.model.named_parameters())
            yield from ((name, named[name]) for name in self._trained)

    def _place(self, batch: MultimodalBatch) -> MultimodalBatch:
        return batch.to(self._device, getattr(torch, self.options.model.dtype))


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """Under ZeRO-3 a parameter is empty outside its gather, and DeepSpeed keeps the whole shape beside it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
