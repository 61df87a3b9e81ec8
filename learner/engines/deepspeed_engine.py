"""DeepSpeedEngine: ZeRO stages 0 to 3, on GPUs with NCCL and on CPUs with gloo.

How gradients come out as plain sums: DeepSpeed averages over ranks and would divide by its count of micro-batches.
The loss carries the number of ranks as a factor against the former, `scale_wrt_gas=False` switches the latter off, and
with `managed_gradient_accumulation: false` each `step()` ends the accumulation, whatever the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from learner.algorithm.schedule import learning_rate
from learner.engines.deepspeed_state import (
    forget_gradients,
    link_moments,
    read_full,
    read_weight,
    set_step_count,
    write_full,
    write_weight,
)
from learner.engines.export import save_policy
from learner.engines.optimizer import ClippingAdamW, parameter_groups, poisoned_unless_finite
from learner.engines.process_group import all_reduce
from learner.engines.protocol import MOMENTS, MicroLoss, ReadTensor, StepResult, StepTotals, on_cpu, state_bytes
from learner.model.load import load_policy, load_reference
from learner.model.policy import PolicyModule
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter
from vlm.batch import MultimodalBatch
from vlm.encoding import FeatureRow
from vlm.media.types import MediaKind
from weight_sync.protocols import WeightSource
from weight_sync.source import PolicySource


class DeepSpeedEngine:
    """Implements TrainEngine. The default process group must exist (`learner.engines.process_group.join`)."""

    def __init__(self, options: LearnerOptions, adapter: MultimodalAdapter) -> None:
        # DeepSpeed would compile a shared-memory collective, for minutes, that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()  # adopts the existing process group
        self.rank, self.world_size, self.steps = dist.get_rank(), dist.get_world_size(), 0
        self.options, self.adapter = options, adapter
        self._device = deepspeed.get_accelerator().current_device_name()
        config = engine_config(options)
        self.policy = _load_partitioned(load_policy, options, adapter, config)
        self._trained = {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}
        self._optimizer = _make_optimizer(list(self._trained.values()), options)
        self._engine = deepspeed.initialize(model=self.policy, optimizer=self._optimizer, config=config)[0]
        self._reference = None
        if options.needs_reference and not options.lora_rank:
            self._reference = _make_reference(options, adapter, config, self._device)

    @torch.no_grad()
    def logprobs(self, batch: MultimodalBatch, *, reference: bool = False) -> Tensor:
        batch = self._place(batch)
        if reference and self.options.lora_rank:
            return self._engine(batch, reference=True)[0].cpu()
        module = self._reference if reference else self._engine
        if module is None:
            raise RuntimeError("no reference policy was loaded: beta is 0")
        return module(batch)[0].cpu()

    def media_features(self, batch: MultimodalBatch) -> dict[MediaKind, list[FeatureRow]]:
        return on_cpu(self._engine(self._place(batch), features_only=True))

    def constant_kinds(self) -> tuple[MediaKind, ...]:
        return self.policy.constant_kinds()

    def recorded_kinds(self) -> tuple[MediaKind, ...]:
        return self.policy.recorded_kinds()

    def media_cost(self) -> float:
        return self.policy.media_cost

    def train_step(self, batches: Sequence[MultimodalBatch], micro_loss: MicroLoss) -> StepResult:
        totals = StepTotals()
        for batch in batches:
            batch = self._place(batch)
            terms = micro_loss(batch, *self._engine(batch))
            self._engine.backward(poisoned_unless_finite(terms.loss) * self.world_size, scale_wrt_gas=False)
            totals.add(terms)
        rate = learning_rate(self.steps, self.options)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        taken = self._engine.was_step_applied()  # no stage takes one whose gradient norm is not finite
        if taken and self.steps == 0:
            link_moments(self._engine.optimizer)
        if not taken:
            forget_gradients(self._engine.optimizer)
        self.steps += taken
        own = self._optimizer if isinstance(self._optimizer, ClippingAdamW) else None
        norm = float(self._engine.get_global_grad_norm()) if own is None else own.grad_norm
        loss, sums, maxima = totals.reduce(self)
        return StepResult(loss, norm, rate, sums, maxima, taken, {} if taken else totals.not_finite())

    def refresh_reference(self) -> None:
        for name, reference in self._refreshed():
            write_weight(reference, read_full(self._trained[name], None, self._optimizer))

    def _refreshed(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The reference's copies of trained parameters, if they are ever set."""
        if self.options.reference_every:
            if self._reference is None:
                raise RuntimeError("no reference policy was loaded that could be refreshed")
            module: Any = getattr(self._reference, "module", self._reference)
            named = dict(module.model.named_parameters())
            yield from ((name, named[name]) for name in self._trained)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return all_reduce(values, dist.ReduceOp.SUM, self._device)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return all_reduce(values, dist.ReduceOp.MAX, self._device)

    def weight_source(self, bucket_bytes: int) -> WeightSource:
        return PolicySource(self.policy.model, rename=self.adapter.engine_weight_name, bucket_bytes=bucket_bytes)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._trained.items():
            yield f"param/{name}", read_full(parameter, None, self._optimizer)
            for moment in MOMENTS if self.steps else ():
                yield f"{moment}/{name}", read_full(parameter, moment, self._optimizer)
        for name, parameter in self._refreshed():
            yield f"reference/{name}", read_weight(parameter)

    def state_bytes(self) -> int:
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self._trained.values())
        return state_bytes(trained, self.steps, bool(self.options.reference_every))

    def load_state_tensors(self, read: ReadTensor, steps: int) -> None:
        self.steps = steps
        set_step_count(self._engine.optimizer, self._optimizer, steps)
        for name, parameter in self._trained.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            write_full(parameter, None, read(f"param/{name}", shape), self._optimizer)
            for moment in MOMENTS if steps else ():
                write_full(parameter, moment, read(f"{moment}/{name}", shape), self._optimizer)
        for name, parameter in self._refreshed():
            write_weight(parameter, read(f"reference/{name}", getattr(parameter, "ds_shape", parameter.shape)))

    def save_pretrained(self, directory: Path) -> None:
        save_policy(self.policy, self.adapter, directory, rank=self.rank)

    def _place(self, batch: MultimodalBatch) -> MultimodalBatch:
        return batch.to(self._device, getattr(torch, self.options.dtype))


def engine_config(options: LearnerOptions) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes are formal: micro-batches are ours."""
    stage = options.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if options.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": options.device == "cuda"}
    if options.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": options.device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if stage == 0 else options.max_grad_norm,
        "bf16": {"enabled": options.dtype == "bfloat16"},
        # In bfloat16 the sum over micro-batches would lose what the later ones add.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _load_partitioned(
    load: Callable[[LearnerOptions, MultimodalAdapter], PolicyModule],
    options: LearnerOptions,
    adapter: MultimodalAdapter,
    config: dict[str, Any],
) -> PolicyModule:
    """Load with `load`; under ZeRO-3 each parameter is partitioned as it is read, so that no rank holds the model."""
    if options.zero_stage != 3:
        return load(options, adapter)
    keep = HfDeepSpeedConfig(config)  # in force, by a weak reference, as long as this object lives
    try:
        with _tensors_keep_their_dtype():
            return load(options, adapter)
    finally:
        unset_hf_deepspeed_config()
        del keep


@contextmanager
def _tensors_keep_their_dtype() -> Iterator[None]:
    """`deepspeed.zero.Init`, which transformers calls, leaves the dtype of new tensors alone. In bfloat16 it would
    round what a constructor computes, such as the frequencies of rotary embeddings."""
    original = deepspeed.zero.Init
    deepspeed.zero.Init = partial(original, tensor_overrides=[deepspeed.zero.DeepSpeedTensorOverride.device])
    try:
        yield
    finally:
        deepspeed.zero.Init = original


def _make_reference(
    options: LearnerOptions, adapter: MultimodalAdapter, config: dict[str, Any], device: str
) -> nn.Module:
    """The frozen initial policy: partitioned under ZeRO-3, else whole on every rank."""
    module = _load_partitioned(load_reference, options, adapter, config)
    if options.zero_stage != 3:
        return module.to(device)
    zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    return deepspeed.initialize(model=module, config={**config, "zero_optimization": zero})[0]


def _make_optimizer(parameters: list[nn.Parameter], options: LearnerOptions) -> torch.optim.Optimizer:
    """AdamW of torch; for states offloaded from a GPU DeepSpeed's, which is several times as fast on a CPU (and
    compiles itself at first use). Stage 0 has no ZeRO optimizer around it that would clip and look at the norm."""
    if options.zero_stage == 0:
        return ClippingAdamW(parameters, options, fused=True)
    groups = parameter_groups(parameters, options.weight_decay)
    given: dict[str, Any] = {"lr": options.learning_rate, "betas": options.betas}
    if options.offload != "none" and options.device == "cuda":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **given)
    return torch.optim.AdamW(groups, fused=True, **given)
