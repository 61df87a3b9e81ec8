"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images and videos as rows of patches, M-RoPE positions from their grids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vlm.adapter import MultimodalAdapter
from vlm.encoding import Counts, FeatureRow, Modality
from vlm.families.mrope import MediaGrid, mrope_positions
from vlm.media.types import MediaKind
from vlm.tower_end import TowerEnd

GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""Patches -> the grids that tell how many patches an item has."""


class QwenVLAdapter(MultimodalAdapter):
    """Takes `pixel_values [P, D]` with `image_grid_thw [N, 3]` (time, height, width in patches). Item n owns
    `grid[n].prod()` consecutive rows and expands to a quarter of that many tokens (merge size 2). Videos work in the
    same way."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<|image_pad|>", ("pixel_values", "image_grid_thw"), ("image_grid_thw",)),
        "video": Modality(
            "<|video_pad|>",
            ("pixel_values_videos", "video_grid_thw"),
            ("video_grid_thw", "second_per_grid_ts"),
            "get_video_features",
        ),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    tower: ClassVar[str | None] = "visual"
    shares_prompts: ClassVar[bool] = True
    seconds_input: ClassVar[str] = "second_per_grid_ts"
    """The input with the seconds of one step in time of each video's grid."""

    def image_settings(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Return limits in pixels, as the processor takes them."""
        most = tokens * self._pixels_per_token()
        yield {"size": {"shortest_edge": min(self._size["shortest_edge"], most), "longest_edge": most}}

    def most_image_tokens(self) -> int:
        return int(self._size["longest_edge"]) // self._pixels_per_token()

    @property
    def _size(self) -> Any:
        return self.processor.image_processor.size

    def _pixels_per_token(self) -> int:
        images = self.processor.image_processor
        return int(images.patch_size * images.merge_size) ** 2

    def entries(
        self, name: str, inputs: Mapping[str, Tensor], input_ids: Sequence[Tensor], counts: Sequence[Counts]
    ) -> list[int]:
        """Count patches by grids, and everything else by item."""
        if name not in GRIDS:
            return super().entries(name, inputs, input_ids, counts)
        grids = inputs[GRIDS[name]].split(super().entries(GRIDS[name], inputs, input_ids, counts))
        return [int(grid.prod(-1).sum()) for grid in grids]

    def position_ids(self, input_ids: Tensor, attention_mask: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        items = {1: self._images(inputs), 2: self._videos(inputs)}
        return mrope_positions(self._kinds(input_ids), attention_mask, items)

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return `mm_token_type_ids [B, L]`: 1 at tokens of images, 2 at tokens of videos. transformers derives
        positions from it, if none are given."""
        return {"mm_token_type_ids": self._kinds(input_ids).to(torch.int32)}

    def _kinds(self, input_ids: Tensor) -> Tensor:
        image, video = self.placeholder_ids["image"], self.placeholder_ids["video"]
        return (input_ids == image).long() + 2 * (input_ids == video).long()

    def tower_end(self, backbone: Any) -> TowerEnd:
        """Return the end of the tower, before the mergers, which are in the tower's module. One merger takes the output
        of the last block, and those of deepstack take the outputs of other blocks."""
        visual = backbone.visual
        used = {len(visual.blocks) - 1, *getattr(visual, "deepstack_visual_indexes", ())}
        sources = tuple(block for i, block in enumerate(visual.blocks) if i in used)
        return TowerEnd(sources, tuple(block for i, block in enumerate(visual.blocks) if i not in used))

    def positions_per_second(self) -> float:
        return float(getattr(self.model_config.vision_config, "tokens_per_second", 1.0))

    def _images(self, inputs: Mapping[str, Tensor]) -> Iterator[MediaGrid]:
        for grid in inputs.get("image_grid_thw", ()):
            yield self._in_tokens(grid), 1.0

    def _videos(self, inputs: Mapping[str, Tensor]) -> Iterator[MediaGrid]:
        """Return the grids of videos. A step in time takes as many positions as its seconds (1 in Qwen2-VL, which does
        not state them) have tokens."""
        grids = inputs.get("video_grid_thw", ())
        seconds = inputs.get(self.seconds_input, torch.ones(len(grids)))
        for grid, step in zip(grids, seconds, strict=True):
            yield self._in_tokens(grid), float(step) * self.positions_per_second()

    def _in_tokens(self, grid: Tensor) -> Tensor:
        merge = int(self.model_config.vision_config.spatial_merge_size)
        return grid // torch.tensor([1, merge, merge], device=grid.device)


class Qwen3VLAdapter(QwenVLAdapter):
    """Has patches of 16 pixels. The tower's features also enter the first language layers (deepstack). The time in
    seconds announces each frame of a video, and a frame has positions like an image."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": QwenVLAdapter.modalities["image"],
        "video": Modality(
            "<|video_pad|>", ("pixel_values_videos", "video_grid_thw"), ("video_grid_thw",), "get_video_features"
        ),
    }

    def _videos(self, inputs: Mapping[str, Tensor]) -> Iterator[MediaGrid]:
        for grid in inputs.get("video_grid_thw", ()):
            frames, height, width = self._in_tokens(grid).tolist()
            for _ in range(frames):
                yield torch.tensor([1, height, width]), 1.0

    def repeat_features(self, features: Any, index: Tensor) -> None:
        """Repeat the features, and also `deepstack_features`: per layer, one tensor `[tokens, H]` per item."""
        features.deepstack_features = [[layer[i] for i in index] for layer in features.deepstack_features]
        super().repeat_features(features, index)

    def cut_features(self, features: Any) -> list[FeatureRow]:
        return [*zip(features.pooler_output, *features.deepstack_features, strict=True)]

    def join_features(self, rows: Sequence[FeatureRow]) -> Any:
        pooled, *deep = (list(values) for values in zip(*rows, strict=True))
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deep)
