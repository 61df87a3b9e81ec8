"""Aria: a mixture of experts that reads every image through a fixed number of queries."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vlm.adapter import MultimodalAdapter


class AriaAdapter(MultimodalAdapter):
    """`pixel_values [N, 3, S, S]`, padded to a square, and `pixel_mask [N, S, S]`. transformers hides the padding from
    the tower and vLLM does not; the mask is made all ones, so that both see it."""

    image_token: ClassVar[str] = "<|img|>"
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<|img|>",)
    image_kwargs: ClassVar[tuple[str, ...]] = ("pixel_mask",)
    shares_prompts: ClassVar[bool] = True

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in super().without_bookkeeping(outputs).items() if k != "num_crops"}
        if "pixel_mask" in kept:
            kept["pixel_mask"] = torch.ones_like(kept["pixel_mask"])
        return kept
