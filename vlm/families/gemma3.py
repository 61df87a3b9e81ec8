"""Gemma3: a fixed number of tokens per image, and sliding windows in most layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vlm.adapter import Messages, MultimodalAdapter
from vlm.encoding import Modality
from vlm.families.llava import TOWER_LEVEL
from vlm.media.types import Media, MediaKind


class Gemma3Adapter(MultimodalAdapter):
    """Takes `pixel_values [N, 3, H, W]`. The text contains `<start_of_image>`, and the expanded prompt
    `<image_soft_token>`s."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {"image": Modality("<start_of_image>")}
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    tower: ClassVar[str | None] = "vision_tower"
    image_tokens_fixed: ClassVar[str] = "every image takes the same number of tokens"
    nested_images: ClassVar[bool] = True
    engine_name_parts = (TOWER_LEVEL,)
    untrainable_on: ClassVar[Mapping[str, str]] = {
        "cuda": "vLLM lets the tokens of an image see each other there (but not on CPU), and the learner does not"
    }

    not_adapted: ClassVar[Mapping[str, str]] = {"projector": "it is a bare matrix and not a linear layer"}

    def render(self, messages: Messages) -> str:
        """Render without blank lines beside an image. It brings its own, and with more of them vLLM would not find
        it."""
        image = re.escape(self.modalities["image"].placeholder)
        return re.sub(rf"(\n?)\n*({image})\n*", r"\1\2", super().render(messages))

    def expanded_length(self, token_ids: Sequence[int], media: Sequence[Media]) -> int:
        """Return the expanded length. The tokenizer merges the blank lines around an image's tokens with adjacent
        text."""
        text = self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return len(
            self.tokenize(text.replace(self.modalities["image"].placeholder, self.processor.full_image_sequence))
        )

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return `token_type_ids [B, L]`, 0 everywhere: image tokens see only tokens before them, as in vLLM on CPU.
        (With 1 at image tokens, transformers lets them see each other.)"""
        return {"token_type_ids": torch.zeros_like(input_ids)}
