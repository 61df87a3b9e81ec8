"""Qwen2-VL, Qwen2.5-VL: images as rows of patches, M-RoPE positions derived from `mm_token_type_ids`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vlm.adapter import MultimodalAdapter


class QwenVLAdapter(MultimodalAdapter):
    """`pixel_values [P, D]` with `image_grid_thw [N, 3]`: image n owns `grid[n].prod()` consecutive rows and expands to
    a quarter of that many tokens (merge size 2)."""

    image_token: ClassVar[str] = "<|image_pad|>"
    placeholder_tokens: ClassVar[tuple[str, ...]] = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """`mm_token_type_ids [B, L]`: 1 at image tokens, from which the model derives M-RoPE positions."""
        return {"mm_token_type_ids": (input_ids == self.image_token_id).to(torch.int32)}
