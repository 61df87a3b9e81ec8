"""Aria: a mixture of experts that reads every image through a fixed number of queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vlm.adapter import MultimodalAdapter
from vlm.encoding import Modality
from vlm.families.idefics3 import place_patches_as_vllm
from vlm.media.types import MediaKind


class AriaAdapter(MultimodalAdapter):
    """Takes `pixel_values [N, 3, S, S]`, padded to a square, and `pixel_mask [N, S, S]`, which marks the padding."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<|img|>", ("pixel_values", "pixel_mask")),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<|img|>",)
    tower: ClassVar[str | None] = "vision_tower"
    image_tokens_fixed: ClassVar[str] = "every image takes the same number of tokens"
    shares_prompts: ClassVar[bool] = True
    untrainable_on: ClassVar[Mapping[str, str]] = {
        "cpu": "vLLM keeps the old experts after an update",
        "cuda": "it has not been tested that vLLM takes new experts there",
    }

    not_adapted: ClassVar[Mapping[str, str]] = {
        "language.mlp": "the experts of a layer are stacked in one parameter and are not linear layers, so "
        "adapters would reach only the shared expert"
    }

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        return {k: v for k, v in super().without_bookkeeping(outputs).items() if k != "num_crops"}

    def engine_weight_name(self, name: str) -> str | None:
        return None if "vision_tower.post_layernorm." in name else super().engine_weight_name(name)  # never applied

    def prepare_model(self, model: Any) -> None:
        """Let the tower's patches attend to padding as in vLLM, since the learner must compute what the engine samples
        from. In transformers they do not. Both hide padding from the projector, and count positions without it."""

        def unmasked(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": None}

        place_patches_as_vllm(model.base_model.vision_tower.embeddings)
        model.base_model.vision_tower.encoder.register_forward_pre_hook(unmasked, with_kwargs=True)
