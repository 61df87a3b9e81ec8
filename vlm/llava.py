"""LLaVA-1.5: a fixed number of tokens for every image."""

from __future__ import annotations

from typing import ClassVar

from vlm.adapter import MultimodalAdapter

TOWER_LEVEL = ("vision_tower.", "vision_tower.vision_model.")
"""transformers names the parameters of CLIP and SigLIP towers without a level that vLLM and published weights have."""


class LlavaAdapter(MultimodalAdapter):
    """`pixel_values [N, 3, H, W]`, one entry per image."""

    image_token: ClassVar[str] = "<image>"
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>",)
    shares_prompts: ClassVar[bool] = True
    engine_name_parts = (TOWER_LEVEL,)
