"""InternVL (in transformers' own format): one to many tiles an image, one a frame, a fixed number of tokens each."""

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
    """`pixel_values [tiles, 3, H, W]`, of images and of videos' frames in the order of their places; nothing but the
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
        """The most tiles: of several, each image has one more, which shows all of it. Two tokens stand around them."""
        tiles = (tokens - 2) // int(self.processor.image_seq_length)
        most = max(1, tiles - 1 if tiles > 2 else 1)
        yield {"min_patches": min(self.processor.image_processor.min_patches, most), "max_patches": most}

    def most_image_tokens(self) -> int:
        """Of an image as many tiles wide as there may be."""
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
        """vLLM writes a video's own placeholder where transformers writes that of images."""
        return np.where(token_ids == self.placeholder_ids["video"], self.placeholder_ids["image"], token_ids)

    def comparable(
        self, learner: Mapping[str, Tensor], engine: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """vLLM has frames apart from images. (Those of prompts with images behind videos cannot be compared.)"""
        tiles = [engine[name] for name in ("pixel_values", "pixel_values_videos") if name in engine]
        return learner, {"pixel_values": torch.cat(tiles)} if tiles else {}

    def _tiles(self, input_ids: Tensor) -> int:
        return input_ids.tolist().count(self.placeholder_ids["image"]) // int(self.model_config.image_seq_length)
