"""PolicySource: the learner's weights in the form that the engines load, gathered bucket by bucket.

    parameters ──(peft prefixes stripped, tied head left out)──▶ entries ──buckets──▶ gather ─▶ (engine name, tensor)

LoRA is merged on the way, and 4-bit weights are dequantized: the engine gets the names and shapes of the base model.

The whole model is never on one rank: one bucket (or the largest single tensor) is gathered at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from weight_sync.protocols import ParamMeta
from weight_sync.verify import WeightMismatchError

PEFT_PREFIX = "base_model.model."
ADAPTER = "default"


@dataclass(frozen=True)
class _Entry:
    """One tensor to be sent: a parameter, or a base weight with the LoRA layer that changes it."""

    name: str
    weight: nn.Parameter
    lora: Any = None
    """peft's LoRA layer around it, or None."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        if self.lora is None:
            return [self.weight]
        return [self.weight, self.lora.lora_A[ADAPTER].weight, self.lora.lora_B[ADAPTER].weight]

    @property
    def meta(self) -> ParamMeta:
        if (quantized := _quantized(self.weight)) is not None:
            return ParamMeta(self.name, quantized.dtype, tuple(quantized.shape))
        # Under ZeRO-3 a parameter is empty outside its gather, and DeepSpeed keeps the full shape beside it.
        shape = getattr(self.weight, "ds_shape", self.weight.shape)
        return ParamMeta(self.name, self.weight.dtype, tuple(shape))

    @property
    def problem(self) -> str:
        """Why the merge would not give the weights that the learner trains; empty if it does."""
        if self.lora is None:
            return ""
        if self.lora.disable_adapters or ADAPTER not in self.lora.active_adapters:
            return "its adapter is switched off"
        return "its adapter is merged already" if self.lora.merged else ""

    def tensor(self) -> Tensor:
        """The full tensor. Call this while `parameters` are gathered. The base weight is never changed by the merge."""
        base = dequantized(self.weight)
        if self.lora is None:
            return base
        a, b = (self.lora.lora_A[ADAPTER].weight.detach(), self.lora.lora_B[ADAPTER].weight.detach())
        delta: Tensor = self.lora.scaling[ADAPTER] * (b.float() @ a.float())
        return (base.float() + (delta.T if self.lora.fan_in_fan_out else delta)).to(base.dtype)


class PolicySource:
    """A `WeightSource` over a (peft-wrapped, ZeRO-partitioned or plain) Hugging Face model."""

    def __init__(
        self, model: nn.Module, *, rename: Callable[[str], str | None] = str, bucket_bytes: int = 8 * 2**20
    ) -> None:
        """`rename` maps a base parameter name to the engine's, or to None for one that the engine does not have
        (`MultimodalAdapter.engine_weight_name`).

        Raises ValueError for an adapter that cannot be merged into a linear layer's own weight (DoRA, LoRA on
        embeddings or on a head that is tied to them), and for one that no engine would get."""
        self._entries = []
        for name, weight, lora in _base_parameters(model):
            if (new := rename(name)) is not None:
                self._entries.append(_Entry(new, weight, lora))
            elif lora is not None:
                raise ValueError(f"{name} has a LoRA adapter, but the engine has no such weight (engine_weight_name)")
        self._bucket_bytes = bucket_bytes
        names = [entry.name for entry in self._entries]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"two parameters have the same engine name: {', '.join(twice[:5])}")

    def metadata(self) -> list[ParamMeta]:
        return [entry.meta for entry in self._entries]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Raises WeightMismatchError, on every rank and before anything is gathered, if an adapter is not in use."""
        if unbound := [f"{entry.name}: {entry.problem}" for entry in self._entries if entry.problem]:
            text = f"{len(unbound)} LoRA layers cannot be merged into what the engines get: {'; '.join(unbound[:5])}"
            raise WeightMismatchError("gathering the weights", (), text)
        for bucket in self._buckets():
            with gathered([p for entry in bucket for p in entry.parameters]):
                for entry in bucket:
                    yield entry.name, entry.tensor()

    def _buckets(self) -> Iterator[list[_Entry]]:
        bucket: list[_Entry] = []
        size = 0
        for entry in self._entries:
            if bucket and size + entry.meta.nbytes > self._bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(entry)
            size += entry.meta.nbytes
        if bucket:
            yield bucket


def dequantized(weight: nn.Parameter) -> Tensor:
    """`weight` itself, or for 4-bit weights the matrix `[out, in]` that the layer computes with, in its precision."""
    quantized = _quantized(weight)
    if quantized is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(weight.data, quantized)
    return whole


def _quantized(weight: nn.Parameter) -> Any:
    """The state (shape, dtype, scales) that bitsandbytes keeps beside packed 4-bit values; None for a plain weight."""
    return getattr(weight, "quant_state", None)


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """A context in which ZeRO-3 parameters have their full values (collective). Others always have them."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None)
    return context


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Yield `(base name, parameter, LoRA layer or None)` for each parameter of the base model. `named_parameters` gives
    a tied weight once, under its first name, which is the one that the engine loads."""
    adapted: dict[str, Any] = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for name, module in adapted.items():
        _check_mergeable(name, module)
    layers = tuple(adapted)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            if not name.startswith(tuple(f"{layer}.lora_" for layer in layers)):
                raise ValueError(f"{name}: no layer has this LoRA weight, so no engine would get it")
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        lora = adapted.pop(owner, None) if leaf == "weight" else None
        base = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        yield base, parameter, lora
    if adapted:
        raise ValueError(
            f"{next(iter(adapted))}: another layer shares its weight and is not changed by the adapter, so the adapter "
            "cannot be merged"
        )


def _check_mergeable(name: str, module: Any) -> None:
    if not isinstance(module.base_layer, nn.Linear):
        raise ValueError(f"{name}: only LoRA on linear layers can be sent to an engine, not {type(module).__name__}")
    if list(module.lora_A) != [ADAPTER]:
        raise ValueError(f"{name}: only a single adapter can be merged, not {list(module.lora_A)}")
    if (variant := module.lora_variant.get(ADAPTER)) is not None:
        raise ValueError(f"{name}: only plain LoRA can be merged, not {type(variant).__name__}")
    if module.lora_bias[ADAPTER]:
        raise ValueError(f"{name}: only LoRA without biases of its own can be merged")
