"""Whole parameters and optimizer moments in and out of DeepSpeed's flat partitions, one parameter at a time.

Every function is collective. They use DeepSpeed's own functions (`safe_get_full_*`, `safe_set_*`); only
`set_step_count` touches the flat partitions themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn


def read_full(parameter: nn.Parameter, moment: str | None, optimizer: torch.optim.Optimizer) -> Tensor:
    """The float32 master weight (`moment` None), or a moment by AdamW's name for it."""
    if moment is None:
        master = safe_get_full_fp32_param(parameter)
        return parameter.detach() if master is None else master
    value = safe_get_full_optimizer_state(parameter, moment)
    return optimizer.state[parameter][moment] if value is None else value


@torch.no_grad()
def write_full(parameter: nn.Parameter, moment: str | None, value: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Set what `read_full` reads. The weight that computes is set together with the master weight."""
    value = value.float()
    partitioned = hasattr(parameter, "ds_id")
    if moment is not None:
        if partitioned:
            safe_set_local_optimizer_state(parameter, _own_partition(parameter, value), moment)
        elif parameter in optimizer.state:
            optimizer.state[parameter][moment].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
        return
    if partitioned:
        safe_set_local_fp32_param(parameter, _own_partition(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)
    write_weight(parameter, value)


def read_weight(parameter: nn.Parameter) -> Tensor:
    """The whole weight that computes."""
    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


@torch.no_grad()
def write_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the weight that computes."""
    with GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
        parameter.data.copy_(value)


def _own_partition(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part under ZeRO-3, the last one padded. `safe_set_full_*` fail if the number of elements is not
    divisible by the number of ranks."""
    size = parameter.ds_tensor.numel()
    whole = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return whole.narrow(0, size * dist.get_rank(), size)


def set_step_count(zero: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Give the optimizer moments of zero and a count of `steps`. AdamW itself creates moments only in its first step,
    and `safe_set_full_optimizer_state` needs them to exist."""
    partitions = flat_partitions(zero, optimizer)
    optimizer.state.clear()
    if not steps:
        return
    for flat in partitions:
        count = torch.tensor(float(steps), device=flat.device) if isinstance(optimizer, torch.optim.AdamW) else steps
        optimizer.state[flat] = {
            "step": count,
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    link_moments(zero)


def link_moments(zero: Any) -> None:
    """Let every parameter find its moments. ZeRO-1 and ZeRO-2 do this themselves after the first group of parameters
    has taken its first step, when the moments of the other groups do not exist yet."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def forget_gradients(zero: Any) -> None:
    """Drop what was summed up for a step that was not taken. ZeRO-1 and -2 do so but with offloaded states in bfloat16,
    where they would add the next step's gradients to it: one such step would be the last that is taken."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))


def flat_partitions(zero: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's float32 tensors that the optimizer steps on, for ZeRO-3, ZeRO-1 and 2, ZeRO-1 in bfloat16, and
    stage 0."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
