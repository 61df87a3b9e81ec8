"""Towers that attend window by window, on GPUs: one call of the flash kernel over all windows of a layer.

transformers calls `sdpa` once for each window, thousands of times for an image; to an implementation whose name has
"flash" in it, it hands where the windows end."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

IMPLEMENTATION = "saccade_flash_windows"


def attend_windows_at_once(model: Any) -> int:
    """Give this attention to each part of `model` whose attention is told of windows. Returns how many layers that is.
    The kernel takes 16-bit floats on GPUs only."""
    AttentionInterface.register(IMPLEMENTATION, _forward)
    layers = [m for m in model.modules() if _attends(m)]
    for layer in layers:
        layer.config._attn_implementation = IMPLEMENTATION
    return len(layers)


def _attends(module: Any) -> bool:
    """Whether it is an attention (not a layer or a tower around one) that takes the ends of windows."""
    return hasattr(module, "scaling") and "cu_seqlens" in signature(type(module).forward).parameters


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """`[1, H, T, D]` each -> `[1, T, H, D]`."""
    rows = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
    ends = cu_seq_lens_q.to(torch.int32)
    out: Any = varlen_attn(rows[0], rows[1], rows[2], ends, ends, max_length_q, max_length_q, scale=scaling)
    return out[None], None
