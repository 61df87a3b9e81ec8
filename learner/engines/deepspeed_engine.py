"""DeepSpeedEngine: ZeRO stages 0 to 3, on GPUs with NCCL and on CPUs with gloo.

Gradients must come out as plain sums, but DeepSpeed averages over ranks and divides by its count of micro-batches.
Multiplying the loss by the number of ranks undoes the former, `scale_wrt_gas=False` switches off the latter, and with
`managed_gradient_accumulation: false` each `step()` ends the accumulation, whatever the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from learner.engines.base import BaseEngine
from learner.engines.deepspeed_state import (
    forget_gradients,
    link_moments,
    read_full,
    read_weight,
    set_step_count,
    write_full,
    write_weight,
)
from learner.engines.optimizer import ClippingAdamW, parameter_groups
from learner.engines.process_group import all_reduce
from learner.model.load import load_policy, load_reference
from learner.model.policy import PolicyModule
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter


class DeepSpeedEngine(BaseEngine):
    """Implements TrainEngine. The default process group must exist (`learner.engines.process_group.join`)."""

    def __init__(self, options: LearnerOptions, adapter: MultimodalAdapter) -> None:
        # DeepSpeed would spend minutes compiling a shared-memory collective that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()  # adopts the existing process group
        super().__init__(options, adapter, deepspeed.get_accelerator().current_device_name())
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        config = engine_config(options)
        self._set_policy(_load_partitioned(load_policy, options, adapter, config))
        self._optimizer = _make_optimizer(list(self._trained.values()), options)
        self._module = deepspeed.initialize(model=self.policy, optimizer=self._optimizer, config=config)[0]
        if options.algorithm.kl is not None and options.model.lora is None:
            self._reference = _make_reference(options, adapter, config, self._device)

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        return all_reduce(values, dist.ReduceOp.SUM, self._device)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return all_reduce(values, dist.ReduceOp.MAX, self._device)

    def _backward(self, loss: Tensor) -> None:
        self._module.backward(loss * self.world_size, scale_wrt_gas=False)

    def _step(self) -> tuple[bool, float]:
        self._module.step()
        taken = self._module.was_step_applied()  # no stage takes a step whose gradient norm is not finite
        if taken and self.steps == 0:
            link_moments(self._module.optimizer)
        if not taken:
            forget_gradients(self._module.optimizer)
        own = self._optimizer if isinstance(self._optimizer, ClippingAdamW) else None
        return taken, float(self._module.get_global_grad_norm()) if own is None else own.grad_norm

    def _restart_optimizer(self, steps: int) -> None:
        set_step_count(self._module.optimizer, self._optimizer, steps)

    def _read(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        return read_full(parameter, moment, self._optimizer)

    def _write(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        write_full(parameter, moment, value, self._optimizer)

    def _read_reference(self, parameter: nn.Parameter) -> Tensor:
        return read_weight(parameter)

    def _write_reference(self, parameter: nn.Parameter, value: Tensor) -> None:
        write_weight(parameter, value)


def engine_config(options: LearnerOptions) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch sizes have no effect: we make the micro-batches."""
    learner, stage = options.learner, options.learner.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if learner.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": options.device == "cuda"}
    if learner.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": options.device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if stage == 0 else learner.max_grad_norm,
        "bf16": {"enabled": options.model.dtype == "bfloat16"},
        # In bfloat16 the sum over micro-batches would lose the contribution of later ones.
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
    """Load with `load`. Under ZeRO-3 each parameter is partitioned as it is read, so that no rank holds the model."""
    if options.learner.zero_stage != 3:
        return load(options, adapter)
    keep = HfDeepSpeedConfig(config)  # is in force while this object lives (transformers has a weak reference)
    try:
        with _tensors_keep_their_dtype():
            return load(options, adapter)
    finally:
        unset_hf_deepspeed_config()
        del keep


@contextmanager
def _tensors_keep_their_dtype() -> Iterator[None]:
    """Make `deepspeed.zero.Init`, which transformers calls, keep the dtype of new tensors. In bfloat16 it would round
    what a constructor computes, such as the frequencies of rotary embeddings."""
    original = deepspeed.zero.Init
    deepspeed.zero.Init = partial(original, tensor_overrides=[deepspeed.zero.DeepSpeedTensorOverride.device])
    try:
        yield
    finally:
        deepspeed.zero.Init = original


def _make_reference(
    options: LearnerOptions, adapter: MultimodalAdapter, config: dict[str, Any], device: str
) -> nn.Module:
    """Make the frozen initial policy: partitioned under ZeRO-3, else whole on every rank."""
    module = _load_partitioned(load_reference, options, adapter, config)
    if options.learner.zero_stage != 3:
        return module.to(device)
    zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
    return deepspeed.initialize(model=module, config={**config, "zero_optimization": zero})[0]


def _make_optimizer(parameters: list[nn.Parameter], options: LearnerOptions) -> torch.optim.Optimizer:
    """Make torch's AdamW, or for states offloaded from a GPU DeepSpeed's, which is several times as fast on a CPU (and
    is compiled at first use). Stage 0 has no ZeRO optimizer around it that clips and checks the norm."""
    config = options.learner
    if config.zero_stage == 0:
        return ClippingAdamW(parameters, config, fused=True)
    groups = parameter_groups(parameters, config.weight_decay)
    given: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas}
    if config.offload != "none" and options.device == "cuda":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **given)
    return torch.optim.AdamW(groups, fused=True, **given)
