"""The shape of one transformer layer, for activations.py and flops.py: its linear layers and norms.

Widths come from the modules. Their names only say which of them read the same tensor, and which is q, k or v.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

QKV = ("q_proj", "k_proj", "v_proj", "q", "k", "v", "qkv")
"""Linear layers that read the same tensor, the normed hidden states; `qkv` makes all three at once."""
GATE = ("gate_proj", "up_proj")
"""Linear layers of a gated MLP that read the same tensor."""
ATTENTION = "attention"
"""The input of the projection behind attention: attention's output."""


@dataclass(frozen=True)
class NormShape:
    """A normalisation inside a layer."""

    width: int
    """Elements normalised per token, over all heads together."""
    kind: Literal["native", "rms", "gemma"]
    """`native`: torch's LayerNorm, one kernel. `rms`: written out in float32, the weight applied in the model's
    precision. `gemma`: written out, the weight applied in float32 too."""
    trained: bool


@dataclass(frozen=True)
class LinearShape:
    """A linear layer inside a layer."""

    inputs: int
    outputs: int
    reads: str
    """Layers with the same value read the same tensor."""
    trained: bool
    """Whether its own weight is trained, not only an adapter's."""
    lora_rank: int = 0


@dataclass(frozen=True)
class LayerShape:
    """One transformer layer: attention over `heads` and an MLP, each behind a norm."""

    hidden: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together."""
    heads: int
    intermediate: int
    gated: bool
    activation_tensors: int
    """Tensors `[T, intermediate]` that the activation function keeps: its input and its intermediate results."""
    fused_qkv: bool
    """Whether one matrix makes q, k and v, so that v is a view of the whole product."""
    norms: tuple[NormShape, ...]
    linears: tuple[LinearShape, ...]
    scales: int
    """Trained vectors that scale what the layer adds to the residual stream (layer scale)."""


def describe_layer(layer: nn.Module) -> LayerShape:
    """Raises ValueError for a layer that is not attention and a linear MLP."""
    linears = dict(own_linears(layer))
    leaf = {name.rpartition(".")[2]: module for name, module in linears.items()}
    first = next((leaf[name] for name in ("qkv", "q_proj", "q") if name in leaf), None)
    if first is None:
        raise ValueError(f"{type(layer).__name__}: expected projections q, k and v, found {', '.join(leaf)}")
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
        raise ValueError(
            f"{type(layer).__name__}: its MLP is not only linear layers (experts?), which saccade plan does not support"
        )
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
        linears=tuple(describe_linear(name, module, id(module) in inside) for name, module in linears.items()),
        scales=sum(p.requires_grad for p in layer.parameters(recurse=False)),
    )


def own_linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield linear layers by name. One with a LoRA adapter is given as the peft layer around it."""
    for name, inner in module.named_modules():
        plain = isinstance(inner, nn.Linear) and "lora_" not in name and not name.endswith("base_layer")
        if plain or hasattr(inner, "lora_A"):
            yield name, inner


def describe_linear(name: str, module: Any, in_attention: bool = False) -> LinearShape:
    leaf = name.rpartition(".")[2]
    reads = "qkv" if leaf in QKV else "gate" if leaf in GATE else ATTENTION if in_attention else name
    weight = module.get_base_layer().weight if hasattr(module, "lora_A") else module.weight
    rank = next(iter(module.lora_A.values())).weight.shape[0] if hasattr(module, "lora_A") else 0
    return LinearShape(weight.shape[1], weight.shape[0], reads, weight.requires_grad, rank)


def _norms(layer: nn.Module, query: int, key_value: int) -> Iterator[NormShape]:
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
        yield NormShape(width, kind, bool(weight.requires_grad))


def _heads(attention: Any, query: int) -> int:
    size = getattr(attention, "head_dim", None)
    return query // int(size) if size else int(getattr(attention, "num_heads", 1))


def _activation_tensors(layer: nn.Module) -> int:
    """SiLU, GELU and the like are one kernel that keeps its input; x * sigmoid(1.702 x) written out keeps the sigmoid
    too."""
    return 2 if any("QuickGELU" in type(m).__name__ for m in layer.modules()) else 1
