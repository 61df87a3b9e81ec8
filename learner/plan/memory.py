"""The predicted memory of a learner rank: what is held all the time, and what each phase of a step needs beside it.

    ModelShape, LearnerOptions, Load (a micro-batch) ──▶ plan_memory ──▶ MemoryPlan: bytes by kind, and the peak

The peak is not the sum of everything, because not everything exists at once: gradients of the layers appear as
activations go, and the optimizer's temporaries come when both are gone. Each phase is added up by itself, and the
largest counts.

`learner/plan/zero_states.py` has the states, `learner/plan/activations.py` what layers keep; the logits are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from learner.model.logprobs import rows_per_chunk
from learner.plan.activations import F32, TowerBytes, final_norm_bytes, projector_bytes, tower_bytes
from learner.plan.model_shape import ModelShape
from learner.plan.zero_states import States, element_bytes, zero_states
from learner.types import LearnerOptions


@dataclass(frozen=True)
class Load:
    """A micro-batch, and how many of them a step has on a rank."""

    tokens: int
    """Positions of the language model, prompts included."""
    rows: int
    """Rows of the vocabulary projection: trained tokens."""
    patches: int = 0
    """Positions of the vision tower."""
    micro_batches: int = 2


@dataclass(frozen=True)
class UnitBytes:
    """Bytes that one more unit of a micro-batch adds to the peak. They turn a budget in bytes into budgets of units.

    A micro-batch takes `token * tokens + patch * patches + row * rows + fixed`."""

    token: float
    """A position of the language model: what its layers keep (checkpointed: their inputs, and one layer recomputed)."""
    patch: float
    """A position of the vision tower, likewise, with its share of the projector; if frozen, while it runs."""
    row: float
    """A trained token: its hidden state in the head, and the gradient of that. Logits are chunked, so not in it."""
    fixed: float
    """The chunk of logits and the head's gradient. Once a chunk is full, a smaller micro-batch does not lower this."""

    def of(self, load: Load) -> float:
        return self.token * load.tokens + self.patch * load.patches + self.row * load.rows + self.fixed


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank."""

    device: Mapping[str, float]
    """By kind, each at its largest: weights, what training them needs, and what a micro-batch needs."""
    host: Mapping[str, float]
    """Bytes that offload keeps in CPU memory instead, by kind."""
    phases: Mapping[str, float]
    """Bytes on the device at the highest point of each phase of a step."""
    units: UnitBytes

    @property
    def phase(self) -> str:
        """The phase that has the peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> float:
        return self.phases[self.phase]

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


def plan_memory(shape: ModelShape, options: LearnerOptions, load: Load) -> MemoryPlan:
    """Predict the memory of a rank in its second step and later, when the optimizer has its moments."""
    size = element_bytes(options)
    states = zero_states(shape, options)
    text = tower_bytes(shape.language, size, "language" in options.learner.gradient_checkpointing)
    text = replace(text, saved=text.saved + behind_bytes(shape, size))
    image = _vision(shape, options, "vision" in options.learner.gradient_checkpointing)
    logits = logits_bytes(shape, options, load.rows)
    device = {
        "parameters": states.parameters + states.gathered,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations": text.peak * load.tokens,
        "logits chunk": logits,
        "vision": image.peak * load.patches,
        "inputs": input_bytes(shape, options, load),
        "workspace": max(states.reduction, states.step) - states.gradients,
    }
    units = UnitBytes(
        token=text.peak,
        patch=image.peak,
        row=2.0 * size * shape.hidden,
        fixed=logits - 2.0 * size * shape.hidden * load.rows,
    )
    return MemoryPlan(device, states.host, _phases(shape, states, device, text, image, load, size), units)


def _phases(
    shape: ModelShape,
    states: States,
    device: Mapping[str, float],
    text: TowerBytes,
    image: TowerBytes,
    load: Load,
    size: int,
) -> dict[str, float]:
    """Bytes on the device at the highest point of each phase.

    With one micro-batch a step, gradients do not exist yet when activations are largest (but ZeRO-3's buffer does).
    A matrix that is both embedding and head gets two gradients: that of the head waits for that of the embedding."""
    held = states.parameters + states.optimizer + device["inputs"]
    passing = held + states.gathered + (states.gradients if load.micro_batches > 1 else states.standing) + states.bucket
    vision = image.saved * load.patches
    matrix = size * shape.vocabulary * shape.hidden
    waiting = matrix if shape.tied and shape.head_trained else 0.0
    return {
        "forward": passing + states.gathering + text.saved * load.tokens + vision,
        "logits": passing + text.saved * load.tokens + vision + device["logits chunk"],
        "language layers": passing + device["activations"] + vision + waiting,
        "vision": passing + device["vision"] + waiting,
        "embedding": passing + vision + waiting + (matrix if shape.embedding_trained else 0.0),
        "reduction of gradients": held + states.reduction,
        "optimizer step": held + states.step,
    }


def logits_bytes(shape: ModelShape, options: LearnerOptions, rows: int) -> float:
    """Bytes at the highest point of `learner.model.logprobs`, which computes `[c, V]` logits for c rows at a time.

    Forward: the scaled logits and their exponential, float32: 8 c V. Backward: log-probabilities that are turned into
    the logits' gradient in place, 4 c V, or 8 if entropy has a gradient; in bfloat16 2 more, for the product before and
    the gradient behind it. If the head is trained, its gradient is summed in float32 (4 V H), in bfloat16 with that of
    one chunk beside it (2 V H). The gradient of the hidden rows exists beside the rows themselves."""
    size, V = element_bytes(options), shape.vocabulary
    c = min(rows, rows_per_chunk(V, options.device))
    cast = 0 if options.model.dtype == "float32" else 2
    backward = ((8 if options.algorithm.entropy_bonus else 4) + cast) * c * V
    if shape.head_trained:
        backward += F32 * V * shape.hidden + (size * V * shape.hidden if cast else 0)
    return float(max((8 + cast) * c * V, backward) + 2 * size * shape.hidden * rows)


def _vision(shape: ModelShape, options: LearnerOptions, checkpointed: bool) -> TowerBytes:
    """Bytes per patch: the layers, the patch itself if the layer that reads it is trained, and the projector's share.

    A tower without a gradient keeps nothing, but its layers' widest tensors exist while it runs forward."""
    size = element_bytes(options)
    if shape.vision is None:
        return TowerBytes(0.0, 0.0, 0.0)
    tower = tower_bytes(shape.vision, size, checkpointed)
    own = projector_bytes(shape, size) / shape.patches_per_token
    if shape.vision.differentiable and shape.trained.get("vision") and not _shares_inputs(options):
        own += size * shape.patch
    if not shape.vision.differentiable:
        layer = shape.vision.layer
        passing = size * (3 * layer.intermediate + 2 * layer.hidden)
        return TowerBytes(own, 0.0, float(passing))
    return replace(tower, saved=tower.saved + own)


def _shares_inputs(options: LearnerOptions) -> bool:
    """Whether training uses the batch's own tensors: on a CPU in float32 they are neither moved nor cast."""
    return options.device == "cpu" and options.model.dtype == "float32"


def input_bytes(shape: ModelShape, options: LearnerOptions, load: Load) -> float:
    """Bytes of pixels on the device. The pixels of all micro-batches of a step wait in host memory as float32, which on
    a CPU is the device's own memory. On a GPU only those of the current micro-batch are there."""
    waiting = F32 * shape.patch * load.patches * load.micro_batches
    return float(waiting) if options.device == "cpu" else float(element_bytes(options) * shape.patch * load.patches)


def behind_bytes(shape: ModelShape, size: int) -> float:
    """Bytes per language token beside the layers: last norm, its output, rotary cosines and sines, the token's id."""
    layer = shape.language.layer
    return final_norm_bytes(shape, size) + 2 * size * layer.query / max(layer.heads, 1) + 8


def with_unit_bytes(shape: ModelShape, options: LearnerOptions) -> LearnerOptions:
    """Fill in what a token, a patch and a row take, if `options` limit micro-batches in bytes.

    Raises ValueError for a limit below what any micro-batch takes."""
    if options.learner.micro_batch_bytes is None:
        return options
    # A chunk of logits, and the head's gradient, are part of every micro-batch.
    full = Load(tokens=0, rows=2**20)
    units = plan_memory(shape, options, full).units
    if units.fixed >= options.learner.micro_batch_bytes:
        raise ValueError(
            f"any micro-batch takes {units.fixed / 2**30:.2f} GiB, for a chunk of logits and the gradient of the head; "
            f"{options.learner.micro_batch_bytes / 2**30:g} GiB leave nothing for tokens"
        )
    return replace(options, unit_bytes=(units.token, units.patch, units.row, units.fixed))
