"""LLaVA-1.5: a fixed number of tokens for every image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from vlm.adapter import MultimodalAdapter
from vlm.encoding import Modality
from vlm.media.types import MediaKind

TOWER_LEVEL = ("vision_tower.", "vision_tower.vision_model.")
"""The level in names of CLIP and SigLIP parameters that vLLM and published weights have and transformers does not."""


class LlavaAdapter(MultimodalAdapter):
    """Takes `pixel_values [N, 3, H, W]`, with one entry per image."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {"image": Modality("<image>")}
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<image>",)
    tower: ClassVar[str | None] = "vision_tower"
    image_tokens_fixed: ClassVar[str] = "every image takes the same number of tokens"
    shares_prompts: ClassVar[bool] = True
    engine_name_parts = (TOWER_LEVEL,)

    def engine_weight_name(self, name: str) -> str | None:
        """Return the engine's name of a weight. If the image features come from a layer before the last, vLLM does not
        have the layers after it."""
        layer = re.search(r"vision_tower\..*layers\.(\d+)\.", name)
        if layer is not None and int(layer.group(1)) >= self._tower_layers_used():
            return None
        if "vision_tower.post_layernorm." in name:  # the output of a layer is used unchanged
            return None
        return super().engine_weight_name(name)

    def _tower_layers_used(self) -> int:
        depth = int(self.model_config.vision_config.num_hidden_layers)
        chosen = self.model_config.vision_feature_layer
        indices = chosen if isinstance(chosen, list | tuple) else [chosen]
        # Hidden state 0 is the input of the first layer, hidden state n the output of the n-th.
        return max(index if index >= 0 else depth + 1 + index for index in indices)
