"""Base weights in 4 bits, which adapters are trained over: QLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def quantize_linear_layers(model: Any, layers: Sequence[str]) -> None:
    """Put bitsandbytes' 4-bit layers in the place of the linear `layers` of `model`, on the CPU, in place.

    NF4 in blocks of 64, the blocks' scales in 8 bits in their turn, as QLoRA has it. They compute in the precision of
    the weights they replace; `weight_sync.source` gives out what they compute with.

    Raises ValueError where bitsandbytes is not installed."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ValueError("quantize=nf4 needs bitsandbytes: pip install -e '.[qlora]'") from error
    for name in layers:
        linear = model.get_submodule(name)
        dtype, bias = linear.weight.dtype, linear.bias is not None
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        # Quantized on its way to a device, here from the CPU to the CPU.
        layer.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer).to("cpu")
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False) if bias else None
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    model.is_loaded_in_4bit = True  # by this peft knows to put 4-bit LoRA layers around them
