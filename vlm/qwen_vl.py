"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images as rows of patches, M-RoPE positions derived from `mm_token_type_ids`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from vlm.adapter import EncodedPrompt, MultimodalAdapter


class QwenVLAdapter(MultimodalAdapter):
    """`pixel_values [P, D]` with `image_grid_thw [N, 3]`: image n owns `grid[n].prod()` consecutive rows and expands to
    a quarter of that many tokens (merge size 2)."""

    image_token: ClassVar[str] = "<|image_pad|>"
    placeholder_tokens: ClassVar[tuple[str, ...]] = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )

    image_kwargs: ClassVar[tuple[str, ...]] = ("image_grid_thw",)
    position_kwargs: ClassVar[tuple[str, ...]] = ("image_grid_thw",)
    shares_prompts: ClassVar[bool] = True

    def encode_batch(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[EncodedPrompt]:
        """One call of the processor over all prompts with images (three times as fast as one each), cut apart by
        image grids and attention mask."""
        encoded = [self.encode(text, []) if not own else None for text, own in zip(texts, images, strict=True)]
        where = [i for i, own in enumerate(images) if own]
        if not where:
            return [e for e in encoded if e is not None]
        out = self.processor(
            text=[texts[i] for i in where],
            images=[image for i in where for image in images[i]],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        counts = [len(images[i]) for i in where]
        grids = out["image_grid_thw"].split(counts)
        patches = out["pixel_values"].split([int(grid.prod(-1).sum()) for grid in grids])
        for i, ids, mask, grid, pixels, count in zip(
            where, out["input_ids"], out["attention_mask"], grids, patches, counts, strict=True
        ):
            encoded[i] = EncodedPrompt(ids[mask.bool()], pixels, {"image_grid_thw": grid}, count)
        return [e for e in encoded if e is not None]

    def position_ids(
        self, backbone: Any, input_ids: Tensor, attention_mask: Tensor, extra: Mapping[str, Any]
    ) -> Tensor:
        """M-RoPE `[3, B, L]`, from the grids of the images."""
        positions, _ = backbone.get_rope_index(
            input_ids,
            extra["mm_token_type_ids"],
            image_grid_thw=extra.get("image_grid_thw"),
            attention_mask=attention_mask,
        )
        return positions

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """`mm_token_type_ids [B, L]`: 1 at image tokens, from which the model derives M-RoPE positions."""
        return {"mm_token_type_ids": torch.eq(input_ids, self.image_token_id or -1).to(torch.int32)}


class Qwen3VLAdapter(QwenVLAdapter):
    """Patches of 16 pixels; the tower's features enter the first language layers too (deepstack)."""

    def repeat_features(self, encoded: Any, index: Tensor) -> None:
        """`deepstack_features`: per layer `[tokens of all images, H]`."""
        lengths = [len(f) for f in encoded.pooler_output]
        encoded.deepstack_features = [
            torch.cat([layer.split(lengths)[i] for i in index]) for layer in encoded.deepstack_features
        ]
        super().repeat_features(encoded, index)
