"""Parameters, gradients and optimizer state of one rank, in bytes, as DeepSpeed's ZeRO stages hold them.

The figures follow DeepSpeed's code (version in pyproject.toml) as deepspeed_engine.py configures it: gradients
accumulate in float32 whatever the model's precision. Bytes per trained element and rank, for R ranks and D bytes an
element of the model:

    stage  gradients        master  moments  reduction of gradients                      step
    0      4                -       8 (*)    a flat copy 4                               -
    1      4                4 / R   8 / R    bucket 4, its copy 4 (+), partition 4 / R   partition 4 / R
    1 (§)  4, and D         4 / R   8 / R    a flat copy 4                               -
    2      4 / R            4 / R   8 / R    bucket D, its copy D (+), partition (#)     partition 4 / R
    3      4 / R, bucket D  4 / R   8 / R    a copy D, in float32 4 / R (#)              partition 4 / R

(*) not divided. (§) in bfloat16 stage 1 is another optimizer, which keeps the model's own gradients beside the float32
ones, and both whole until the step is over. (+) between several ranks. (#) stage 2 makes the partition anew for each
micro-batch in float32, and adds into a standing one in bfloat16; stage 3 casts what is not float32. The float32 master
exists beside float32 weights too. A bucket holds at most 5e8 elements: on a GPU it is allocated whole, on a CPU memory
that was never written takes nothing. Torch's fused AdamW makes no temporaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from learner.plan.model_shape import ModelShape
from learner.types import LearnerOptions

F32 = 4
BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, in elements."""
PREFETCH = 50_000_000
"""DeepSpeed's `stage3_prefetch_bucket_size`: elements that ZeRO-3 gathers at once."""
SUB_GROUP = 1_000_000_000
"""DeepSpeed's `sub_group_size`: elements of a partition that ZeRO-3 takes a step with at once."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: under ZeRO-3 this many elements stay gathered through forward and backward,
because they are used again within `stage3_max_reuse_distance`, which is as large."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes on the device, except `host`."""

    parameters: float
    """This rank's part of policy and reference."""
    gathered: float = 0.0
    """Parameters that ZeRO-3 has gathered in forward and backward."""
    gathering: float = 0.0
    """The buffer that they are gathered into and copied from. It stays until the last of them was used."""
    gradients: float
    """Held from one micro-batch to the next."""
    standing: float = 0.0
    """The part of them that exists before the first gradient."""
    bucket: float = 0.0
    """Allocated beside them as soon as a gradient arrives."""
    optimizer: float
    reduction: float
    """While gradients are reduced over ranks, gradients included."""
    step: float
    """In the optimizer's step, gradients included."""
    host: Mapping[str, float] = field(default_factory=dict)
    """Bytes that offload keeps in CPU memory instead, by kind."""


def element_bytes(options: LearnerOptions) -> int:
    return F32 if options.model.dtype == "float32" else 2


def zero_states(shape: ModelShape, options: LearnerOptions) -> States:
    """States of the policy (LoRA adapters included, in the model's precision), and of a reference if there is one."""
    states = _without_offload(shape, options)
    if options.device == "cpu":
        return states  # there is only one memory
    return _offloaded(states, shape, options)


def _without_offload(shape: ModelShape, options: LearnerOptions) -> States:
    size, n, gpu = element_bytes(options), shape.total_trained, options.device == "cuda"
    stage, ranks = options.learner.zero_stage, options.learner.ranks
    copies = 2 if options.algorithm.kl is not None and options.model.lora is None else 1
    # NF4: 4 bits a weight, and 8 bits for the scale of each 64 of them.
    compact = shape.quantized * (size - 0.5 - 1 / 64) if options.model.quantize == "nf4" else 0.0
    whole, part = copies * (size * shape.total - compact), n / ranks
    full, bucket = float(F32 * n), min(n, BUCKET)
    optimizer, step = 3 * F32 * part, F32 * part
    if stage == 0:
        reduction = full + F32 * bucket
        return States(parameters=whole, gradients=full, optimizer=2 * full, reduction=reduction, step=full)
    if stage == 1 and size != F32:
        held = full + size * n
        reduction = held + F32 * bucket
        return States(
            parameters=whole, gradients=held, standing=full, optimizer=optimizer, reduction=reduction, step=held
        )
    if stage < 3:
        return _two_stages(
            States(parameters=whole, gradients=0, optimizer=optimizer, reduction=0, step=step), n, options
        )
    gathered = float(size * min(shape.total, LIVE)) if ranks > 1 else 0.0
    standing = F32 * part + size * (BUCKET if gpu else bucket)
    return States(
        parameters=whole / ranks,
        gathered=gathered,
        gathering=min(gathered, float(size * PREFETCH)),
        gradients=standing,
        standing=standing,
        optimizer=optimizer,
        reduction=gathered + standing + size * bucket + (0 if size == F32 else F32 * part),
        step=standing + step * min(1.0, SUB_GROUP / max(part, 1)),
    )


def _two_stages(states: States, n: int, options: LearnerOptions) -> States:
    """Stage 1 in float32, and stage 2. They are the same code in DeepSpeed, with other contents of a bucket."""
    size, gpu, part = element_bytes(options), options.device == "cuda", n / options.learner.ranks
    bucket = size * (BUCKET if gpu else min(n, BUCKET))
    copy = size * min(n, BUCKET) if options.learner.ranks > 1 else 0
    again = F32 * part if size == F32 else 0  # the partition, of this micro-batch
    if options.learner.zero_stage == 1:
        left = F32 * max(0, n - BUCKET)
        held, reduction = float(F32 * n), bucket + copy + again + left
    else:
        held, reduction = F32 * part, F32 * part + bucket + copy + again
    return replace(states, gradients=float(held), bucket=float(bucket) if gpu else 0.0, reduction=float(reduction))


def _offloaded(states: States, shape: ModelShape, options: LearnerOptions) -> States:
    """With the optimizer offloaded, master, moments and accumulated gradients are in host memory, and beside them a
    gradient and a copy in the model's precision for the step; on the device remain the buckets."""
    host: dict[str, float] = {}
    values = {name: getattr(states, name) for name in States.__dataclass_fields__ if name != "host"}
    learner = options.learner
    part, size = shape.total_trained / learner.ranks, element_bytes(options)
    if learner.offload != "none" and learner.zero_stage:
        host |= {"optimizer": states.optimizer + size * part, "gradients": 2 * F32 * part}
        bucket = size * BUCKET
        standing = bucket if learner.zero_stage == 3 else 0.0
        values |= {"optimizer": 0.0, "gradients": standing, "standing": standing, "step": standing}
        copied = size * min(shape.total_trained, BUCKET) if learner.ranks > 1 or learner.zero_stage == 3 else 0
        values["reduction"] = float(bucket + copied + (states.gathered if learner.zero_stage == 3 else 0))
    if learner.offload == "parameters" and learner.zero_stage == 3:
        host["parameters"] = states.parameters
        values["parameters"] = 0.0
        values["gathered"] = float(size * min(shape.total, LIVE))
        values["gathering"] = min(values["gathered"], float(size * PREFETCH))
    return States(**values, host=host)
