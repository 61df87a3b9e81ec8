"""predict: the memory and the operations of a learner's step, from a configuration alone. The one entry of this room.

    LearnerOptions, adapter ──▶ predict ──▶ ModelShape (meta device: no weights) ──▶ Prediction
        Prediction.memory(micro-batch) ──▶ MemoryPlan        Prediction.flops(groups) ──▶ Flops
        Prediction.options: the same options, which also know what micro-batches take if these are limited in bytes

`saccade plan`, preflight, and the start of a run that limits micro-batches in bytes use it. The learner itself does
not: its options say what its micro-batches take.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from learner.plan.flops import Flops, GroupShape, step_flops
from learner.plan.memory import Load, MemoryPlan, plan_memory, with_unit_bytes
from learner.plan.model_shape import ModelShape, describe
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter


@dataclass(frozen=True)
class Prediction:
    shape: ModelShape
    options: LearnerOptions

    def memory(self, load: Load) -> MemoryPlan:
        """The memory of a rank that trains on micro-batches of `load`."""
        return plan_memory(self.shape, self.options, load)

    def flops(self, groups: Iterable[GroupShape]) -> Flops:
        """The operations of a step over `groups`, on all ranks."""
        return step_flops(self.shape, self.options, groups)


def predict(options: LearnerOptions, adapter: MultimodalAdapter) -> Prediction:
    """Describe the model of `options` without loading it.

    Raises ValueError for a model that cannot be described, and for a limit of micro-batches that is below what any of
    them takes."""
    shape = describe(options, adapter)
    return Prediction(shape, with_unit_bytes(shape, options))
