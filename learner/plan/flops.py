"""Floating-point operations of a learner's step, counted by formula: one multiplication and one addition are two.

    ModelShape, groups (a prompt's length, those of its completions, its patches) ──▶ Flops by part

Linear layers: 2 per weight and token. Attention: 4 per pair that sees each other and element of the queries' width
(scores, and the mix of values): a prompt of P tokens has P^2 / 2 pairs, a completion of L tokens behind it
L P + L^2 / 2, so a prompt is counted once for its group. In the vision tower an image's patches all see each other,
or those of their window.

A forward pass counts 1, its backward pass 2 where weights are trained (gradients of inputs and of weights), else 1;
recomputation under checkpointing counts 1 more. A frozen tower whose outputs are cached counts once: all items are new.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from learner.plan.layer_shape import LayerShape
from learner.plan.model_shape import ModelShape, Tower
from learner.types import LearnerOptions


@dataclass(frozen=True)
class GroupShape:
    """A prompt and its completions."""

    prompt: int
    """Tokens, those of media included."""
    completions: Sequence[int]
    """Tokens of each."""
    images: Sequence[int] = ()
    """Patches of each distinct image (or frame) of the prompt."""

    @property
    def tokens(self) -> int:
        """Positions of the language model."""
        return self.prompt + sum(self.completions)

    @property
    def pairs(self) -> float:
        """Pairs of tokens that see each other, causally."""
        own = sum(n * self.prompt + n * n / 2 for n in self.completions)
        return self.prompt**2 / 2 + own


@dataclass(frozen=True)
class Flops:
    language: float = 0.0
    """The language model's linear layers."""
    attention: float = 0.0
    """The language model's attention."""
    vision: float = 0.0
    """The vision tower, with its attention."""
    projector: float = 0.0
    head: float = 0.0
    """The vocabulary projection."""

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, language: float, vision: float, projector: float, head: float) -> Flops:
        return Flops(
            language=self.language * language,
            attention=self.attention * language,
            vision=self.vision * vision,
            projector=self.projector * projector,
            head=self.head * head,
        )


def forward_flops(shape: ModelShape, groups: Iterable[GroupShape]) -> Flops:
    """Count one forward pass over groups."""
    total = Flops()
    linear, text = shape.language.layers * _weights(shape.language.layer), shape.language
    for group in groups:
        vision = projector = 0.0
        if shape.vision is not None:
            vision = sum(_image(shape, shape.vision, patches) for patches in group.images)
            weights = sum(m.inputs * m.outputs for m in shape.projector)
            projector = 2.0 * weights * sum(group.images) / shape.patches_per_token
        total += Flops(
            language=2.0 * linear * group.tokens,
            attention=4.0 * text.layers * text.layer.query * group.pairs,
            vision=vision,
            projector=projector,
            head=2.0 * shape.vocabulary * shape.hidden * sum(group.completions),
        )
    return total


def step_flops(shape: ModelShape, options: LearnerOptions, groups: Iterable[GroupShape]) -> Flops:
    """Count a whole step over `groups`: forward, backward, what checkpointing and the chunks of logits recompute, and
    the passes of the reference and of the policy before the second optimizer step, if the options need them."""
    once = forward_flops(shape, groups)
    language, vision = (part in options.learner.gradient_checkpointing for part in ("language", "vision"))
    # Attention has no weights of its own: its backward computes five products where its forward has two; counted as 2.
    back = 2 if any(linear.trained for linear in shape.language.layer.linears) else 1
    tower = shape.vision is not None and shape.vision.differentiable
    projector = bool(shape.trained.get("projector"))
    train = once.times(
        language=1 + back + language,
        vision=1 + _back(tower, options) + vision if tower else 1,
        projector=1 + (_back(projector, options) if tower or projector else 0),
        head=2 + 1 + shape.head_trained,  # the backward pass projects each chunk again
    )
    behind_first = 1 - 1 / options.algorithm.optimizer_steps
    scored = (options.algorithm.kl is not None) + (behind_first if options.algorithm.needs_policy_before else 0)
    cached = shape.vision is not None and shape.vision.cached
    return train + once.times(scored, 0 if cached else scored, 0 if cached and not projector else scored, scored)


def _back(trained: bool, options: LearnerOptions) -> int:
    """Count the backward passes of a part that a gradient passes through."""
    return 2 if trained and options.model.lora is None else 1


def _weights(layer: LayerShape) -> int:
    """Count the elements of a layer's matrices, adapters included."""
    return sum(m.inputs * m.outputs + m.lora_rank * (m.inputs + m.outputs) for m in layer.linears)


def _image(shape: ModelShape, tower: Tower, patches: int) -> float:
    full = tower.layers if tower.window is None else tower.full_layers
    seen = full * patches + (tower.layers - full) * min(patches, tower.window or patches)
    layers = tower.layers * 2.0 * _weights(tower.layer) + 4.0 * tower.layer.query * seen
    return (layers + 2.0 * shape.patch * tower.layer.hidden) * patches
