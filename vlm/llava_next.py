"""LLaVA-NeXT and LLaVA-OneVision: an image is a thumbnail and tiles, unpadded to its shape, with row ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from rollout.types import MediaKind
from vlm.encoded import Modality
from vlm.llava import LlavaAdapter


class LlavaNextAdapter(LlavaAdapter):
    """`pixel_values [N, tiles, 3, H, W]`, padded to the most tiles; `image_sizes [N, 2]` tells how many are real."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<image>", ("pixel_values", "image_sizes")),
    }

    def without_padding(self, inputs: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        if "pixel_values" not in inputs:
            return inputs
        tilings, tile = self.model_config.image_grid_pinpoints, self.model_config.vision_config.image_size
        most = max(image_size_to_num_patches(size, tilings, tile) for size in inputs["image_sizes"])
        return {**inputs, "pixel_values": inputs["pixel_values"][:, :most]}


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT. Images of one prompt are given as a flat list: nested, the processor would take several of them
    for one multi-image sample and not tile them, which vLLM does.

    `pixel_values_videos [N, F, 3, H, W]`, padded to the most frames; `video_frames [N]`, ours, tells how many are
    real."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<image>", ("pixel_values", "image_sizes", "batch_num_images")),
        "video": Modality("<video>", ("pixel_values_videos", "video_frames"), features="get_video_features"),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>", "<video>")
    stacks_videos: ClassVar[bool] = True

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        videos = outputs.get("pixel_values_videos")
        if videos is not None:
            frames = torch.tensor([len(video) for video in videos])
            videos = torch.nn.utils.rnn.pad_sequence(list(videos), batch_first=True)
            outputs = {**outputs, "pixel_values_videos": videos, "video_frames": frames}
        return super().without_bookkeeping(outputs)

    def without_padding(self, inputs: dict[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
        inputs = super().without_padding(inputs, input_ids)
        if "video_frames" not in inputs:
            return inputs
        most = int(inputs["video_frames"].max())
        return {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :most]}

    def media_features(self, backbone: Any, kind: MediaKind, inputs: Mapping[str, Tensor]) -> Any:
        """Features of a video: of its frames, one after another, and one for its end."""
        if kind != "video":
            return super().media_features(backbone, kind, inputs)
        frames = inputs["video_frames"].tolist()
        features = super().media_features(backbone, kind, {"pixel_values_videos": inputs["pixel_values_videos"]})
        padded = features.pooler_output
        each = (padded.shape[1] - 1) // inputs["pixel_values_videos"].shape[1]
        features.pooler_output = [torch.cat([v[: n * each], v[-1:]]) for v, n in zip(padded, frames, strict=True)]
        return features

    def hidden_states(self, model: Any, **inputs: Any) -> Tensor:
        video = inputs.get("mm_encoder_outputs", {}).get("video")
        if video is not None and not isinstance(video.pooler_output, Tensor):
            video.pooler_output = torch.cat(video.pooler_output)[None]  # the model takes videos of one length
        return super().hidden_states(model, **inputs)
