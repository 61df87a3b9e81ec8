"""The bytes that one layer keeps per token for its backward pass, which `learner/plan/memory.py` multiplies out.

For a layer of width H with queries Q, keys and values KV wide, an MLP of width I, and D bytes an element, by what
autograd saves (every tensor once, even if several operations save it):

    norm, `rms`     its input in float32 (4 H), 1/rms, and, if its weight is trained, the normalised input (D H)
    norm, `gemma`   the same, the normalised input in float32 (4 H)
    norm, `native`  its input (D H), mean and 1/deviation
    q, k, v         the tensor that they read (D H), if their weights are trained
    attention       q, k, v (D (Q + 2 KV)), the output (D Q), and one float32 a head: the log-sum-exp; never [T, T]
                    fused qkv: v is a view, so the whole product stays (D (Q + KV) more), and the outputs of the images
                    of a batch are put together in a new tensor (D Q more)
    o               what it reads is attention's output
    MLP, gated      what gate and up read (D H), the gate before and after its activation, up, and their product (4 D I)
    MLP, plain      what it reads (D H), and the hidden layer before and after its activation (2 D I)
    layer scale     what it multiplies (D H each)
    LoRA            what the layer reads, as above, and r numbers between A and B; the frozen weight needs nothing

`tests/model/learner/test_memory.py` counts the same with `torch.autograd.graph.saved_tensors_hooks` on several
families.
"""

from __future__ import annotations

from dataclasses import dataclass

from learner.plan.layer_shape import ATTENTION, LayerShape
from learner.plan.model_shape import ModelShape, Tower

F32 = 4


@dataclass(frozen=True)
class TowerBytes:
    """Bytes per position of a tower of layers."""

    saved: float
    """Held from the forward to the backward pass."""
    recomputed: float
    """Held for one layer, while it is recomputed; 0 without checkpointing."""
    passing: float
    """Gradients of one layer, while it is passed backward."""

    @property
    def peak(self) -> float:
        return self.saved + self.recomputed + self.passing


def layer_bytes(layer: LayerShape, size: int) -> float:
    """Bytes per token that the backward pass of one layer needs. `size`: bytes of an element."""
    norms = sum(_norm_bytes(norm.kind, norm.width, norm.trained, size) for norm in layer.norms)
    attention = size * (2 * layer.query + 2 * layer.key_value) + F32 * layer.heads
    if layer.fused_qkv:
        attention += size * (2 * layer.query + layer.key_value)
    wide = 2 + layer.activation_tensors if layer.gated else layer.activation_tensors
    hidden_layer = size * wide * layer.intermediate
    return norms + attention + hidden_layer + size * (_read(layer) + layer.scales * layer.hidden)


def _norm_bytes(kind: str, width: int, trained: bool, size: int) -> float:
    if kind == "native":
        return size * width + 2 * size
    weighted = F32 if kind == "gemma" else size
    return F32 * width + F32 + (weighted * width if trained else 0)


def _read(layer: LayerShape) -> int:
    """Count the elements of the distinct inputs that trained weights or adapters of a layer read, and r elements for
    each adapter. Attention's output is left out: attention keeps it."""
    inputs = {m.reads: m.inputs for m in layer.linears if (m.trained or m.lora_rank) and m.reads != ATTENTION}
    return sum(inputs.values()) + sum(m.lora_rank for m in layer.linears)


def tower_bytes(tower: Tower, size: int, checkpointed: bool) -> TowerBytes:
    """Bytes per position. A checkpointed layer keeps only its input (D H), and one layer at a time is recomputed.

    In the backward pass through a gated MLP, the gradients of its product, its gate and its up (3 D I) exist beside
    those of the residual stream and of what the MLP reads (2 D H), while only the product has been freed (D I)."""
    layer = tower.layer
    if not tower.differentiable:
        return TowerBytes(0.0, 0.0, 0.0)
    passing = size * ((2 if layer.gated else 1) * layer.intermediate + 2 * layer.hidden)
    each = layer_bytes(layer, size)
    if checkpointed:
        return TowerBytes(float(tower.layers * size * layer.hidden), each, passing)
    return TowerBytes(tower.layers * each, 0.0, passing)


def projector_bytes(shape: ModelShape, size: int) -> float:
    """Bytes per image token: the input of each trained layer between tower and language model, and as much again for
    the activation or norm before it."""
    return sum(2 * size * linear.inputs for linear in shape.projector if linear.trained or linear.lora_rank)


def final_norm_bytes(shape: ModelShape, size: int) -> float:
    """Bytes per language token behind the last layer: a norm of the same kind as the layers' own, and its output."""
    norm = shape.language.layer.norms[0]
    return _norm_bytes(norm.kind, shape.hidden, norm.trained, size) + size * shape.hidden
