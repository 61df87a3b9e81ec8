"""InternVL (in transformers' own format): one or more tiles per image, one per frame, and a fixed number of tokens per
tile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vlm.adapter import MultimodalAdapter
from vlm.encoding import Counts, EncodedPrompt, Modality
from vlm.media.types import Media, MediaKind


class InternVLAdapter(MultimodalAdapter):
    """Takes `pixel_values [tiles, 3, H, W]` of images and of videos' frames, in the order of their places. Only the
    number of placeholders tells how many tiles a prompt has."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<IMG_CONTEXT>"),
        "video": Modality("<video>"),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tower: ClassVar[str | None] = "vision_tower"
    shares_prompts: ClassVar[bool] = True
    stacks_videos: ClassVar[bool] = True

    def image_settings(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Return numbers of tiles. An image with several tiles has one more, the thumbnail. Two tokens enclose them."""
        tiles = (tokens - 2) // int(self.processor.image_seq_length)
        most = max(1, tiles - 1 if tiles > 2 else 1)
        yield {"min_patches": min(self.processor.image_processor.min_patches, most), "max_patches": most}

    def most_image_tokens(self) -> int:
        """Return the tokens of an image that is as many tiles wide as allowed."""
        images = self.processor.image_processor
        width, height = images.max_patches * images.size["width"], images.size["height"]
        return self.media_lengths([Media("image", "", b"", width, height)])[0]

    def entries(
        self, name: str, inputs: Mapping[str, Tensor], input_ids: Sequence[Tensor], counts: Sequence[Counts]
    ) -> list[int]:
        return [self._tiles(ids) for ids in input_ids]

    def tower_layers(self) -> tuple[int, ...]:
        layers = super().tower_layers()
        return () if layers == (-1,) else layers

    def feature_rows(self, prompt: EncodedPrompt, kind: MediaKind) -> int:
        return self._tiles(prompt.input_ids)

    def ids_from_engine(self, token_ids: np.ndarray) -> np.ndarray:
        """Replace the placeholder of videos, which vLLM writes, by that of images, which transformers writes."""
        return np.where(token_ids == self.placeholder_ids["video"], self.placeholder_ids["image"], token_ids)

    def comparable(
        self, learner: Mapping[str, Tensor], engine: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Join images and frames, which vLLM keeps separate. (Prompts with images after videos cannot be compared.)"""
        tiles = [engine[name] for name in ("pixel_values", "pixel_values_videos") if name in engine]
        return learner, {"pixel_values": torch.cat(tiles)} if tiles else {}

    def _tiles(self, input_ids: Tensor) -> int:
        return input_ids.tolist().count(self.placeholder_ids["image"]) // int(self.model_config.image_seq_length)
