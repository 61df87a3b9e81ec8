"""The shape of a model, for memory.py and flops.py: counts and widths, read off its modules.

    LearnerOptions, adapter ──▶ the model on the meta device, LoRA and freezing applied ──▶ ModelShape (plain numbers)

No weight is loaded: on the meta device a parameter is only a shape. Every width comes from the modules themselves, none
from a configuration, so that the same arithmetic holds for language and vision layers of all families.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.model.cached import what_is_cached
from learner.model.load import select_trained
from learner.plan.layer_shape import LayerShape, LinearShape, describe_layer, describe_linear
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter
from vlm.media_cost import patches_per_token

TowerName = Literal["language", "vision"]
TOWERS: tuple[TowerName, ...] = ("language", "vision")


@dataclass(frozen=True)
class Tower:
    """A stack of equal layers."""

    layers: int
    layer: LayerShape
    differentiable: bool
    """Whether a gradient passes through, so that its activations are kept."""
    cached: bool = False
    """Whether its features or tower outputs are cached, so that it runs once per run for each distinct item."""
    window: int | None = None
    """Positions that a layer attends over, except in `full_layers` layers; None: all layers see all of an image."""
    full_layers: int = 0


@dataclass(frozen=True)
class ModelShape:
    """Counts of elements, not bytes."""

    parameters: Mapping[str, int]
    """All parameters by part of the model, LoRA adapters included."""
    trained: Mapping[str, int]
    """Parameters with a gradient, by part of the model."""
    hidden: int
    vocabulary: int
    tied: bool
    """Whether embedding and head are one matrix."""
    head_trained: bool
    embedding_trained: bool
    language: Tower
    vision: Tower | None = None
    patch: int = 0
    """Numbers in one patch of an image, as it enters the vision tower."""
    patches_per_token: float = 1.0
    """Positions of the vision tower per image token of the language model."""
    quantized: int = 0
    """Elements of the layers that QLoRA holds in 4 bits."""
    projector: tuple[LinearShape, ...] = ()
    """Between tower and language model, once per image token."""

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_trained(self) -> int:
        return sum(self.trained.values())


def meta_policy(options: LearnerOptions, adapter: MultimodalAdapter) -> nn.Module:
    """Build the model as it would be trained, without storage: LoRA and freezing applied, nothing loaded.

    Raises ValueError for LoRA targets or frozen parts that the model does not have."""
    kind = adapter.model_class()
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config  # Auto..., or a model's own class
    with torch.device("meta"):
        model = make(adapter.model_config, dtype=getattr(torch, options.model.dtype), attn_implementation="sdpa")
    with torch.device("meta"):
        return select_trained(model, options, adapter)


def describe(options: LearnerOptions, adapter: MultimodalAdapter) -> ModelShape:
    """Raises ValueError for a model whose layers are not attention and a linear MLP."""
    model: Any = meta_policy(options, adapter)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = [(adapter.role(_plain(name)), p) for name, p in model.named_parameters()]
    roles = sorted({role for role, _ in named})
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    trained = {role: sum(p.numel() for r, p in named if r == role and p.requires_grad) for role in roles}
    towers = _towers(model, adapter, trained)
    if "language" not in towers:
        raise ValueError(f"{type(base).__name__}: found no layers of a language model")
    if "vision" in towers:
        cached = what_is_cached(
            tower_trained=towers["vision"].differentiable,
            projector_trained=bool(trained.get("projector")),
            knows_tower_end=adapter.knows_tower_end(),
        )
        towers["vision"] = replace(
            towers["vision"],
            cached=cached is not None and options.learner.feature_cache_gib > 0,
            **_windows(getattr(adapter.model_config, "vision_config", None)),
        )
    projector = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and adapter.role(_plain(name)) == "projector" and "lora_" not in name
    ]
    return ModelShape(
        parameters={role: sum(p.numel() for r, p in named if r == role) for role in roles},
        trained=trained,
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        tied=head is embedding,
        head_trained=head.requires_grad,
        embedding_trained=embedding.requires_grad,
        language=towers["language"],
        vision=towers.get("vision"),
        patch=_patch_elements(base, adapter) if "vision" in towers else 0,
        patches_per_token=patches_per_token(adapter, "image") if "vision" in towers else 1.0,
        quantized=sum(
            m.weight.numel()
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and "lora_" not in name and m.weight is not head
        )
        if options.model.quantize == "nf4"
        else 0,
        projector=tuple(describe_linear(name, module) for name, module in projector),
    )


def _plain(name: str) -> str:
    """A parameter's name without peft's additions."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _towers(model: nn.Module, adapter: MultimodalAdapter, trained: Mapping[str, int]) -> dict[TowerName, Tower]:
    """Find the deepest stack of layers that transformers can checkpoint in each part of the model. `trained`: trained
    parameters by part."""
    found: dict[TowerName, Tower] = {}
    for name, stack in model.named_modules():
        layers = list(stack) if isinstance(stack, nn.ModuleList) else []
        role = adapter.role(_plain(f"{name}.0"))
        if not any(isinstance(layer, GradientCheckpointingLayer) for layer in layers) or role not in TOWERS:
            continue
        tower: TowerName = "language" if role == "language" else "vision"
        if tower not in found or found[tower].layers < len(layers):
            # A gradient passes through the language model if anything is trained, since everything stands before it or
            # in it; through the tower only if something of its own is trained.
            whose = [role for role in trained if tower == "language" or role == tower]
            found[tower] = Tower(len(layers), describe_layer(layers[0]), any(trained[role] for role in whose))
    return found


def _patch_elements(model: nn.Module, adapter: MultimodalAdapter) -> int:
    """Count the elements that the convolution (or linear layer) in front of the tower reads for one patch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and adapter.role(name) == "vision":
            return module.in_channels * math.prod(module.kernel_size)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and adapter.role(name) == "vision":
            return module.in_features
    return 0


def _windows(config: Any) -> dict[str, Any]:
    """Read windowed attention off a vision tower's configuration, in Qwen2.5-VL's names. No module shows it."""
    full = getattr(config, "fullatt_block_indexes", None)
    return {} if full is None else {"window": (config.window_size // config.patch_size) ** 2, "full_layers": len(full)}
