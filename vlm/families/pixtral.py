"""Pixtral (as transformers has it: a LLaVA with a Pixtral tower) and Mistral3: images keep their shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vlm.adapter import MultimodalAdapter
from vlm.encoding import Modality
from vlm.errors import AdapterError
from vlm.media.types import Media, MediaKind


class PixtralAdapter(MultimodalAdapter):
    """Takes `pixel_values [N, 3, H, W]`, padded to the largest image, and the real sizes `image_sizes [N, 2]`. A row of
    patches ends with `[IMG_BREAK]`, and the last row with `[IMG_END]`."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {"image": Modality("[IMG]", ("pixel_values", "image_sizes"))}
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    nested_images: ClassVar[bool] = True
    tower: ClassVar[str | None] = "vision_tower"
    tower_dimension: ClassVar[int] = 1
    shares_prompts: ClassVar[bool] = True

    image_tokens_fixed: ClassVar[str] = "vLLM counts the tokens of an image by the model's own vision_config.image_size"

    def image_settings(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Return settings for squares of n x n tokens, in which each row ends with one more token. (Mistral3 only.)"""
        merged = int(getattr(self.model_config, "spatial_merge_size", 1))
        if merged > 1:
            side = merged * int(self.model_config.vision_config.patch_size)
            yield {"size": {"longest_edge": side * max(2, (math.isqrt(1 + 4 * tokens) - 1) // 2)}}

    def media_lengths(self, media: Sequence[Media]) -> list[int]:
        """Count by trial, since the arithmetic predicts tokens for shapes that the processor then scales to nothing."""
        lengths = [self.length_by_trial(item) for item in media]
        merged = getattr(self.model_config, "spatial_merge_size", 1) > 1
        if merged and min(lengths, default=3) < 3:  # one token, and the end of its row
            raise AdapterError("the image has a single token, which Mistral3's projector does not accept")
        return lengths

    def without_padding(self, inputs: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        if "pixel_values" not in inputs:
            return inputs
        height, width = inputs["image_sizes"].amax(0).tolist()
        return {**inputs, "pixel_values": inputs["pixel_values"][..., :height, :width]}
