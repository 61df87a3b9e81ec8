"""LLaVA-NeXT and LLaVA-OneVision: an image is a thumbnail and tiles, unpadded to its shape, with row ends."""

from __future__ import annotations

from typing import ClassVar

from vlm.adapter import MultimodalAdapter
from vlm.llava import TOWER_LEVEL


class LlavaNextAdapter(MultimodalAdapter):
    """`pixel_values [N, tiles, 3, H, W]`, padded to the most tiles; `image_sizes [N, 2]` tells how many are real."""

    image_token: ClassVar[str] = "<image>"
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>",)
    image_kwargs: ClassVar[tuple[str, ...]] = ("image_sizes",)
    shares_prompts: ClassVar[bool] = True
    engine_name_parts = (TOWER_LEVEL,)


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT. Images of one prompt are given as a flat list: nested, the processor would take several of them
    for one multi-image sample and not tile them, which vLLM does."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<video>")
    image_kwargs: ClassVar[tuple[str, ...]] = ("image_sizes", "batch_num_images")
