"""TorchEngine: one process, plain PyTorch, float32 or float64. The reference that DeepSpeedEngine is tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from learner.algorithm.schedule import learning_rate
from learner.engines.export import save_policy
from learner.engines.optimizer import ClippingAdamW, poisoned_unless_finite
from learner.engines.protocol import MOMENTS, MicroLoss, ReadTensor, StepResult, StepTotals, on_cpu, state_bytes
from learner.model.load import load_policy, load_reference
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind
from weight_sync.protocols import WeightSource
from weight_sync.source import PolicySource


class TorchEngine:
    """Implements TrainEngine. ZeRO and offload options have no meaning here and are ignored."""

    rank = 0
    world_size = 1

    def __init__(self, options: LearnerOptions, adapter: MultimodalAdapter) -> None:
        if options.ranks != 1:
            raise ValueError(f"TorchEngine is one rank, not {options.ranks}")
        self.steps = 0
        self.options, self.adapter = options, adapter
        self.policy = load_policy(options, adapter).to(options.device)
        self._reference = None
        if options.needs_reference and not options.lora_rank:
            self._reference = load_reference(options, adapter).to(options.device)
        self._trained = {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}
        self._optimizer = ClippingAdamW(self._trained.values(), options)

    @torch.no_grad()
    def logprobs(self, batch: MultimodalBatch, *, reference: bool = False) -> Tensor:
        batch = self._place(batch)
        if reference and self.options.lora_rank:
            return self.policy(batch, reference=True)[0].cpu()
        module = self._reference if reference else self.policy
        if module is None:
            raise RuntimeError("no reference policy was loaded: beta is 0")
        return module(batch)[0].cpu()

    def media_features(self, batch: MultimodalBatch) -> dict[MediaKind, list[FeatureRow]]:
        return on_cpu(self.policy(self._place(batch), features_only=True))

    def constant_kinds(self) -> tuple[MediaKind, ...]:
        return self.policy.constant_kinds()

    def recorded_kinds(self) -> tuple[MediaKind, ...]:
        return self.policy.recorded_kinds()

    def media_cost(self) -> float:
        return self.policy.media_cost

    def train_step(self, batches: Sequence[MultimodalBatch], micro_loss: MicroLoss) -> StepResult:
        if self.options.dtype == "bfloat16":
            raise ValueError("TorchEngine keeps no float32 master weights: in bfloat16 it scores, and does not train")
        totals = StepTotals()
        for batch in batches:
            batch = self._place(batch)
            terms = micro_loss(batch, *self.policy(batch))
            poisoned_unless_finite(terms.loss).backward()
            totals.add(terms)
        rate = learning_rate(self.steps, self.options)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        taken = not self._optimizer.overflow
        self.steps += taken
        loss, sums, maxima = totals.reduce(self)
        norm, culprits = self._optimizer.grad_norm, {} if taken else totals.not_finite()
        return StepResult(loss, norm, rate, sums, maxima, taken, culprits)

    @torch.no_grad()
    def refresh_reference(self) -> None:
        for name, reference in self._refreshed():
            reference.copy_(self._trained[name])

    def _refreshed(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The reference's copies of trained parameters, if they are ever set."""
        if self.options.reference_every:
            if self._reference is None:
                raise RuntimeError("no reference policy was loaded that could be refreshed")
            named = dict(self._reference.model.named_parameters())
            yield from ((name, named[name]) for name in self._trained)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def weight_source(self, bucket_bytes: int) -> WeightSource:
        return PolicySource(self.policy.model, rename=self.adapter.engine_weight_name, bucket_bytes=bucket_bytes)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained.items():
            yield f"param/{name}", parameter.detach()
            for moment in MOMENTS if self.steps else ():
                yield f"{moment}/{name}", self._optimizer.state[parameter][moment]
        for name, parameter in self._refreshed():
            yield f"reference/{name}", parameter.detach()

    def state_bytes(self) -> int:
        trained = sum(p.numel() for p in self._trained.values())
        return state_bytes(trained, self.steps, bool(self.options.reference_every))

    def load_state_tensors(self, read: ReadTensor, steps: int) -> None:
        self.steps = steps
        self._optimizer.state.clear()
        for name, parameter in self._trained.items():
            with torch.no_grad():
                parameter.copy_(read(f"param/{name}", parameter.shape))
            if steps:
                moments = {m: read(f"{m}/{name}", parameter.shape).to(parameter.device) for m in MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
        for name, parameter in self._refreshed():
            with torch.no_grad():
                parameter.copy_(read(f"reference/{name}", parameter.shape))

    def save_pretrained(self, directory: Path) -> None:
        save_policy(self.policy, self.adapter, directory, rank=self.rank)

    def _place(self, batch: MultimodalBatch) -> MultimodalBatch:
        return batch.to(self.options.device, getattr(torch, self.options.dtype))
