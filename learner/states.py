"""Parameters, gradients and optimizer of one rank, in bytes, as DeepSpeed's ZeRO stages hold them.

From its code (version in pyproject.toml), as `learner.deepspeed_engine` configures it: gradients accumulate in float32,
whatever the model's precision. Bytes per trained element and rank, for R ranks and D bytes an element of the model:

    stage  gradients        master  moments  reduction of gradients                      step
    0      4                -       8 (*)    a flat copy 4                               Adam on one tensor at a time
    1      4                4 / R   8 / R    bucket 4, its copy 4 (+), partition 4 / R   partition 4 / R, Adam 8 / R
    2      4 / R            4 / R   8 / R    bucket D, its copy D (+), partition (#)     partition 4 / R, Adam 8 / R
    3      4 / R, bucket D  4 / R   8 / R    a copy D, in float32 4 / R (#)              partition 4 / R, Adam 8 / R

(*) not divided. (+) between several ranks. (#) stage 2 makes the partition anew for each micro-batch in float32, and
adds into a standing one in bfloat16; stage 3 casts what is not float32. The float32 master exists beside float32
weights too. A bucket holds at most 5e8 elements: on a GPU it is allocated whole, on a CPU what was never written takes
nothing. Adam of torch makes two temporaries of the tensor it works on (one for many tensors together on a GPU), and a
ZeRO stage gives it the whole partition as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from learner.model_shape import ModelShape
from learner.types import LearnerOptions

F32 = 4
BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, in elements."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`, in elements: under ZeRO-3 so much stays gathered, through forward and
backward, as it will be used again within `stage3_max_reuse_distance`, which is as large."""


@dataclass(frozen=True)
class States:
    """Bytes on the device, but `host`."""

    parameters: float
    """A rank's part of policy and reference."""
    gathered: float
    """Whole parameters of ZeRO-3, in forward and backward."""
    gradients: float
    """Held from one micro-batch to the next."""
    standing: float
    """Of these, what exists before the first gradient does."""
    bucket: float
    """What is allocated beside them as soon as a gradient arrives."""
    optimizer: float
    reduction: float
    """While gradients are reduced over ranks, gradients included."""
    step: float
    """In the optimizer's step, gradients included."""
    host: Mapping[str, float] = field(default_factory=dict)
    """What offload keeps in CPU memory instead, by kind."""


def element_bytes(options: LearnerOptions) -> int:
    return F32 if options.dtype == "float32" else 2


def zero_states(shape: ModelShape, options: LearnerOptions) -> States:
    """Of the policy (adapters of LoRA included, in the model's precision), and of a reference if one is held."""
    states = _without_offload(shape, options)
    if options.device == "cpu":
        return states  # there is but one memory
    return _offloaded(states, shape, options)


def _without_offload(shape: ModelShape, options: LearnerOptions) -> States:
    size, ranks, stage, n = element_bytes(options), options.ranks, options.zero_stage, shape.total_trained
    copies = 2 if options.needs_reference and not options.lora_rank else 1
    whole = copies * size * shape.total
    part, several, full = n / ranks, ranks > 1, options.device == "cuda"
    bucket = BUCKET if full else min(n, BUCKET)
    adam = (F32 if full else 2 * F32) * part
    if stage == 0:
        temporaries = F32 * n if full else 2 * F32 * shape.largest_trained
        held = F32 * n
        return States(whole, 0, held, 0, 0, 2 * F32 * n, held + F32 * min(n, BUCKET), held + temporaries)
    optimizer, step = 3 * F32 * part, F32 * part + adam
    if stage == 1:
        beyond = F32 * max(0, n - BUCKET)
        reduction = F32 * bucket + (F32 * min(n, BUCKET) if several else 0) + F32 * part + beyond
        return States(whole, 0, F32 * n, 0, F32 * BUCKET if full else 0, optimizer, reduction, step)
    if stage == 2:
        again = F32 * part if size == F32 else 0
        reduction = F32 * part + size * bucket + (size * min(n, BUCKET) if several else 0) + again
        return States(whole, 0, F32 * part, 0, size * BUCKET if full else 0, optimizer, reduction, step)
    standing = F32 * part + size * bucket
    reduction = standing + size * min(n, BUCKET) + (0 if size == F32 else F32 * part)
    gathered = size * min(shape.total, LIVE) if several else 0
    return States(whole / ranks, gathered, standing, standing, 0, optimizer, reduction + gathered, standing + step)


def _offloaded(states: States, shape: ModelShape, options: LearnerOptions) -> States:
    """With the optimizer offloaded, master, moments and accumulated gradients are in host memory, and beside them a
    gradient and a copy in the model's precision for the step; on the device remain the buckets."""
    host: dict[str, float] = {}
    values = {name: getattr(states, name) for name in States.__dataclass_fields__ if name != "host"}
    part, size = shape.total_trained / options.ranks, element_bytes(options)
    if options.offload_optimizer and options.zero_stage:
        host |= {"optimizer": states.optimizer + size * part, "gradients": 2 * F32 * part}
        bucket = size * BUCKET
        standing = bucket if options.zero_stage == 3 else 0.0
        values |= {"optimizer": 0.0, "gradients": standing, "standing": standing, "step": standing}
        copied = size * min(shape.total_trained, BUCKET) if options.ranks > 1 or options.zero_stage == 3 else 0
        values["reduction"] = float(bucket + copied + (states.gathered if options.zero_stage == 3 else 0))
    if options.offload_parameters and options.zero_stage == 3:
        host["parameters"] = states.parameters
        values["parameters"] = 0.0
        values["gathered"] = float(size * min(shape.total, LIVE))
    return States(**values, host=host)
