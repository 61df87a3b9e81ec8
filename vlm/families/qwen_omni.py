"""Qwen2.5-Omni: the thinker takes images, videos and sounds and answers with text. The talker is not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration

from vlm.encoding import Modality
from vlm.errors import AdapterError
from vlm.families.qwen_vl import QwenVLAdapter
from vlm.media.types import Media, MediaKind
from vlm.media.video_audio import SOUND_RATE


class QwenOmniAdapter(QwenVLAdapter):
    """Takes images and videos as in Qwen2.5-VL, and sounds as `input_features [N, M, S]` of M mel bands with
    `feature_attention_mask [N, S]`. The tokens of a sound have positions like text."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<|IMAGE|>", ("pixel_values", "image_grid_thw"), ("image_grid_thw",)),
        "video": Modality(
            "<|VIDEO|>",
            ("pixel_values_videos", "video_grid_thw"),
            ("video_grid_thw", "video_second_per_grid"),
            "get_video_features",
        ),
        "audio": Modality("<|AUDIO|>", ("input_features", "feature_attention_mask"), features="get_audio_features"),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = (
        *("<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"),
        *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    )
    seconds_input: ClassVar[str] = "video_second_per_grid"
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("visual.",),
        "audio": ("audio_tower.",),
        "projector": ("visual.merger.",),
    }

    def __init__(self, processor: Any, model_config: Any) -> None:
        super().__init__(processor, getattr(model_config, "thinker_config", model_config))

    def media_lengths(self, media: Sequence[Media]) -> list[int]:
        longest = int(self.processor.feature_extractor.n_samples)
        for item in media:
            if item.kind == "audio" and item.samples > longest:
                raise AdapterError(
                    f"the sound has {item.samples / SOUND_RATE:g} s; the model takes at most {longest / SOUND_RATE:g} s"
                )
        return super().media_lengths(media)

    def positions_per_second(self) -> float:
        return float(self.model_config.position_id_per_seconds)

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {}

    def model_class(self) -> Any:
        return Qwen2_5OmniThinkerForConditionalGeneration

    def comparable(
        self, learner: Mapping[str, Tensor], engine: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Remove the padding of sounds, since vLLM takes only their real frames."""
        if "input_features" not in learner:
            return learner, engine
        real = learner["feature_attention_mask"].bool()
        return {**learner, "input_audio_features": learner["input_features"].transpose(1, 2)[real].T}, engine

    def is_used(self, name: str) -> bool:
        return not name.endswith("audio_bos_eos_token.weight")

    def published_weight_name(self, name: str) -> str:
        return name if name.startswith("thinker.") else f"thinker.{name}"

    def published_config(self, model: Any) -> Any:
        """Return the configuration of the whole family, which vLLM needs, without the talker, whose weights do not
        exist."""
        return Qwen2_5OmniConfig(
            thinker_config=model.config.to_dict(), enable_audio_output=False, architectures=["Qwen2_5OmniModel"]
        )

    def media_features(self, backbone: Any, kind: MediaKind, inputs: Mapping[str, Tensor]) -> Any:
        features = super().media_features(backbone, kind, inputs)
        if kind == "audio":
            frames = inputs["feature_attention_mask"].sum(-1)
            _, lengths = backbone.audio_tower._get_feat_extract_output_lengths(frames)
            features.pooler_output = features.last_hidden_state.split(lengths.tolist())
        return features

    def hidden_states(self, model: Any, **inputs: Any) -> Tensor:
        """Put the features in their places and run the language model. The thinker has no module that contains its
        towers and its language model but not its head."""
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        for kind, features in inputs.pop("mm_encoder_outputs", {}).items():
            values = torch.cat(list(features.pooler_output)).to(embedded.dtype)
            places = inputs["input_ids"] == self.placeholder_ids[kind]
            if int(places.sum()) != len(values):
                raise AdapterError(f"{int(places.sum())} tokens for {len(values)} features of kind {kind}")
            embedded = embedded.masked_scatter(places[..., None], values)
        del inputs["input_ids"]
        return model.model(inputs_embeds=embedded, **inputs, use_cache=False).last_hidden_state
