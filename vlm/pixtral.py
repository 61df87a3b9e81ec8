"""Pixtral (as transformers has it: a LLaVA with a Pixtral tower) and Mistral3: images keep their shape."""

from __future__ import annotations

from typing import ClassVar

from vlm.adapter import MultimodalAdapter


class PixtralAdapter(MultimodalAdapter):
    """`pixel_values [N, 3, H, W]` padded to the largest image, whose real sizes are `image_sizes [N, 2]`. A row of
    patches ends with `[IMG_BREAK]`, the last with `[IMG_END]`."""

    image_token: ClassVar[str] = "[IMG]"
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    image_kwargs: ClassVar[tuple[str, ...]] = ("image_sizes",)
    nested_images: ClassVar[bool] = True
    shares_prompts: ClassVar[bool] = True
