"""LLaVA-NeXT and LLaVA-OneVision: an image is a thumbnail and tiles, unpadded to its shape, with row ends."""

from __future__ import annotations

from typing import ClassVar

from vlm.llava import LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """`pixel_values [N, tiles, 3, H, W]`, padded to the most tiles; `image_sizes [N, 2]` tells how many are real."""

    image_kwargs: ClassVar[tuple[str, ...]] = ("image_sizes",)


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT. Images of one prompt are given as a flat list: nested, the processor would take several of them
    for one multi-image sample and not tile them, which vLLM does."""

    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<video>")
    image_kwargs: ClassVar[tuple[str, ...]] = ("image_sizes", "batch_num_images")
