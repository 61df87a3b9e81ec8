"""What a model is made of, for memory.py and flops.py: counts and widths, read off the model.

    LearnerOptions, adapter ──▶ the model on the meta device, LoRA and freezing applied ──▶ ModelShape (plain numbers)

No weight is loaded: on the meta device a parameter is a shape. That every width comes from the modules themselves, and
none from a configuration, is what makes the same arithmetic hold for language and vision layers of all families.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.model.load import select_trained
from learner.types import LearnerOptions
from vlm.adapter import MultimodalAdapter

Part = Literal["language", "vision"]
PARTS: tuple[Part, ...] = ("language", "vision")
QKV = ("q_proj", "k_proj", "v_proj", "q", "k", "v", "qkv")
"""Linear layers that read one tensor, the normed hidden states; `qkv` makes all three at once."""
GATE = ("gate_proj", "up_proj")
"""Those of a gated MLP that read one tensor."""
ATTENTION = "attention"
"""What the projection behind attention reads: attention's output."""


@dataclass(frozen=True)
class Norm:
    """A normalisation inside a layer."""

    width: int
    """Elements normalised per token, over all heads."""
    kind: Literal["native", "rms", "gemma"]
    """`native`: torch's LayerNorm, one kernel. `rms`: written out in float32, the weight applied in the model's
    precision. `gemma`: written out, the weight applied in float32 too."""
    trained: bool


@dataclass(frozen=True)
class Linear:
    """A linear layer inside a layer."""

    inputs: int
    outputs: int
    reads: str
    """Layers with the same value read the same tensor."""
    trained: bool
    """Its weight, not an adapter's."""
    lora_rank: int = 0


@dataclass(frozen=True)
class LayerShape:
    """One transformer layer: attention over `heads` and an MLP, each behind a norm."""

    hidden: int
    query: int
    """Width of all query heads together; of all key heads: `key_value`."""
    key_value: int
    heads: int
    intermediate: int
    gated: bool
    activation_tensors: int
    """`[T, intermediate]` tensors that the activation function keeps: its input, and what it computes on the way."""
    fused_qkv: bool
    """Whether one matrix makes q, k and v, so that v is a view of the whole product."""
    norms: tuple[Norm, ...]
    linears: tuple[Linear, ...]
    scales: int
    """Vectors of the layer's own that what it adds to the residual stream is multiplied with (layer scale), trained."""


@dataclass(frozen=True)
class Tower:
    """A stack of equal layers."""

    layers: int
    layer: LayerShape
    differentiable: bool
    """Whether a gradient passes through, so that its activations are kept."""
    once: bool = False
    """Whether it runs once per run for each distinct item, and what it gives is kept."""
    window: int | None = None
    """Positions that a layer attends over, but for `full_layers` of them; None: all layers see all of an image."""
    full_layers: int = 0


@dataclass(frozen=True)
class ModelShape:
    """Counts of elements, not bytes."""

    parameters: Mapping[str, int]
    """All parameters by role, adapters of LoRA included."""
    trained: Mapping[str, int]
    """Those with a gradient, by role."""
    hidden: int
    vocabulary: int
    tied: bool
    """Whether embedding and head are one matrix."""
    head_trained: bool
    embedding_trained: bool
    largest_trained: int
    """Elements of the largest trained parameter."""
    language: Tower
    vision: Tower | None = None
    patch: int = 0
    """Numbers that one patch of an image enters the vision tower with."""
    patches_per_token: float = 1.0
    """Positions of the vision tower per image token of the language model."""
    quantized: int = 0
    """Elements of the layers that QLoRA holds in 4 bits."""
    projector: tuple[Linear, ...] = ()
    """Between tower and language model, once per image token."""

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_trained(self) -> int:
        return sum(self.trained.values())


def meta_policy(options: LearnerOptions, adapter: MultimodalAdapter) -> nn.Module:
    """The model as it would be trained, without storage: LoRA and freezing applied, nothing loaded.

    Raises ValueError for LoRA targets or frozen parts that the model does not have."""
    kind = adapter.model_class()
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config  # Auto..., or a model's own class
    with torch.device("meta"):
        model = make(adapter.model_config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
    with torch.device("meta"):
        return select_trained(model, options, adapter)


def describe(options: LearnerOptions, adapter: MultimodalAdapter) -> ModelShape:
    """Raises ValueError for a model whose layers are of another make than attention and a linear MLP."""
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
        kept = not towers["vision"].differentiable and options.feature_cache_gib > 0
        once = kept and (not trained.get("projector") or adapter.knows_tower_end())
        towers["vision"] = replace(
            towers["vision"], once=once, **_windows(getattr(adapter.model_config, "vision_config", None))
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
        largest_trained=max((p.numel() for _, p in named if p.requires_grad), default=0),
        language=towers["language"],
        vision=towers.get("vision"),
        patch=_patch_elements(base, adapter) if "vision" in towers else 0,
        patches_per_token=_patches_per_token(adapter.model_config) if "vision" in towers else 1.0,
        quantized=sum(
            m.weight.numel()
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and "lora_" not in name and m.weight is not head
        )
        if options.quantize == "nf4"
        else 0,
        projector=tuple(_linear(name, module) for name, module in projector),
    )


def _plain(name: str) -> str:
    """A parameter's name without what peft wraps around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _towers(model: nn.Module, adapter: MultimodalAdapter, trained: Mapping[str, int]) -> dict[Part, Tower]:
    """Stacks of layers that transformers can checkpoint, by part of the model; the deepest of each part. `trained`:
    trained parameters by role."""
    found: dict[Part, Tower] = {}
    for name, stack in model.named_modules():
        layers = list(stack) if isinstance(stack, nn.ModuleList) else []
        role = adapter.role(_plain(f"{name}.0"))
        if not any(isinstance(layer, GradientCheckpointingLayer) for layer in layers) or role not in PARTS:
            continue
        part: Part = "language" if role == "language" else "vision"
        if part not in found or found[part].layers < len(layers):
            # A gradient passes through the language model if anything is trained, since all else stands before it or in
            # it; through the tower only if something of its own is.
            whose = [role for role in trained if part == "language" or role == part]
            found[part] = Tower(len(layers), _layer(layers[0]), any(trained[role] for role in whose))
    return found


def _layer(layer: nn.Module) -> LayerShape:
    linears = dict(_own_linears(layer))
    leaf = {name.rpartition(".")[2]: module for name, module in linears.items()}
    first = next((leaf[name] for name in ("qkv", "q_proj", "q") if name in leaf), None)
    if first is None:
        raise ValueError(f"{type(layer).__name__}: no projections q, k and v, but {', '.join(leaf)}")
    fused, hidden = "qkv" in leaf, int(first.in_features)
    query = hidden if fused else int(first.out_features)
    key_value = hidden if fused else int(leaf["k_proj" if "k_proj" in leaf else "k"].out_features)
    gated = all(name in leaf for name in GATE)
    attention = next(m for m in layer.modules() if any(c is first for c in m.children()))
    inside = {id(m) for m in attention.modules()}
    mlp = [m for m in linears.values() if id(m) not in inside]
    widths = [leaf["gate_proj"].out_features] if gated else [m.out_features for m in mlp]
    others = [p for m in layer.modules() if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)]
    if not widths or any(p.ndim > 1 for p in others):
        raise ValueError(f"{type(layer).__name__}: its MLP is not of linear layers alone (experts?): not planned for")
    return LayerShape(
        hidden=hidden,
        query=query,
        key_value=key_value,
        heads=_heads(attention, query),
        intermediate=max(widths),
        gated=gated,
        activation_tensors=_activation_tensors(layer),
        fused_qkv=fused,
        norms=tuple(_norms(layer, query, key_value)),
        linears=tuple(_linear(name, module, id(module) in inside) for name, module in linears.items()),
        scales=sum(p.requires_grad for p in layer.parameters(recurse=False)),
    )


def _own_linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers by name; one with a LoRA adapter as the peft layer around it."""
    for name, inner in module.named_modules():
        plain = isinstance(inner, nn.Linear) and "lora_" not in name and not name.endswith("base_layer")
        if plain or hasattr(inner, "lora_A"):
            yield name, inner


def _linear(name: str, module: Any, in_attention: bool = False) -> Linear:
    leaf = name.rpartition(".")[2]
    reads = "qkv" if leaf in QKV else "gate" if leaf in GATE else ATTENTION if in_attention else name
    weight = module.get_base_layer().weight if hasattr(module, "lora_A") else module.weight
    rank = next(iter(module.lora_A.values())).weight.shape[0] if hasattr(module, "lora_A") else 0
    return Linear(weight.shape[1], weight.shape[0], reads, weight.requires_grad, rank)


def _norms(layer: nn.Module, query: int, key_value: int) -> Iterator[Norm]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.LayerNorm):
            kind: Literal["native", "rms", "gemma"] = "native"
        elif "RMSNorm" in type(module).__name__:
            kind = "gemma" if type(module).__name__.startswith("Gemma") else "rms"
        else:
            continue
        weight = module.weight
        leaf = name.rpartition(".")[2]
        width = query if leaf == "q_norm" else key_value if leaf == "k_norm" else int(weight.numel())
        yield Norm(width, kind, bool(weight.requires_grad))


def _heads(attention: Any, query: int) -> int:
    size = getattr(attention, "head_dim", None)
    return query // int(size) if size else int(getattr(attention, "num_heads", 1))


def _activation_tensors(layer: nn.Module) -> int:
    """SiLU, GELU and the like are one kernel that keeps its input; x * sigmoid(1.702 x) written out keeps the sigmoid
    too."""
    return 2 if any("QuickGELU" in type(m).__name__ for m in layer.modules()) else 1


def _patch_elements(model: nn.Module, adapter: MultimodalAdapter) -> int:
    """Of the convolution (or linear layer) that makes patches into hidden states: the elements it reads for one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and adapter.role(name) == "vision":
            return module.in_channels * math.prod(module.kernel_size)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and adapter.role(name) == "vision":
            return module.in_features
    return 0


def _windows(config: Any) -> dict[str, Any]:
    """Of a vision tower's configuration, in Qwen2.5-VL's names: the side of a window in pixels, the layers without."""
    full = getattr(config, "fullatt_block_indexes", None)
    return {} if full is None else {"window": (config.window_size // config.patch_size) ** 2, "full_layers": len(full)}


def _patches_per_token(config: Any) -> float:
    """How many patches become one image token: by the names that families' configurations have for it."""
    for own in (getattr(config, "vision_config", config), config):
        if hasattr(own, "spatial_merge_size"):
            return float(own.spatial_merge_size) ** 2
    if hasattr(config, "downsample_ratio"):
        return float(config.downsample_ratio) ** -2
    if hasattr(config, "scale_factor"):
        return float(config.scale_factor) ** 2
    if getattr(config, "mm_tokens_per_image", None):
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side**2 / float(config.mm_tokens_per_image)
    return 1.0
