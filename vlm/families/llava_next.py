"""LLaVA-NeXT and LLaVA-OneVision: an image is a thumbnail and tiles, which are unpadded to its shape and have row
ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlm.encoding import Modality
from vlm.families.llava import LlavaAdapter
from vlm.media.types import MediaKind


class LlavaNextAdapter(LlavaAdapter):
    """Takes `pixel_values [N, tiles, 3, H, W]`, padded to the largest number of tiles; `image_sizes [N, 2]` tells how
    many are real."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<image>", ("pixel_values", "image_sizes")),
    }

    image_tokens_fixed: ClassVar[str] = "image_grid_pinpoints in the model's own config.json fixes its tilings"

    def without_padding(self, inputs: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        if "pixel_values" not in inputs:
            return inputs
        tilings, tile = self.model_config.image_grid_pinpoints, self.model_config.vision_config.image_size
        most = max(image_size_to_num_patches(size, tilings, tile) for size in inputs["image_sizes"])
        return {**inputs, "pixel_values": inputs["pixel_values"][:, :most]}


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Works as LLaVA-NeXT. The images of one prompt are a flat list. In a nested list, the processor would treat
    several images as one multi-image sample and not tile them, as vLLM does. Videos are refused: parallel videos of
    different lengths end vLLM's engine."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<image>", ("pixel_values", "image_sizes", "batch_num_images")),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<video>")
