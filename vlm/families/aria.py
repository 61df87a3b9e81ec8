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
    """`pixel_values [N, 3, S, S]`, padded to a square, and `pixel_mask [N, S, S]`, which says what is padding."""

    modalities: ClassVar[Mapping[MediaKind, Modality]] = {
        "image": Modality("<|img|>", ("pixel_values", "pixel_mask")),
    }
    placeholder_tokens: ClassVar[tuple[str, ...]] = ("<|img|>",)
    tower: ClassVar[str | None] = "vision_tower"
    image_tokens_fixed: ClassVar[str] = "an image takes as many tokens whatever its size"
    shares_prompts: ClassVar[bool] = True
    untrainable_on: ClassVar[Mapping[str, str]] = {
        "cpu": "vLLM goes on with the former experts after an update",
        "cuda": "that vLLM takes new experts there was never seen",
    }

    not_adapted: ClassVar[Mapping[str, str]] = {
        "language.mlp": "the experts' weights are stacked in one parameter a layer and no linear layers, so that "
        "adapters would leave out all but the shared expert"
    }

    def without_bookkeeping(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        return {k: v for k, v in super().without_bookkeeping(outputs).items() if k != "num_crops"}

    def engine_weight_name(self, name: str) -> str | None:
        return None if "vision_tower.post_layernorm." in name else super().engine_weight_name(name)  # never applied

    def prepare_model(self, model: Any) -> None:
        """In transformers the tower's patches do not attend to padding, in vLLM they do; both hide it from the
        projector, and number positions without it. The learner has to compute what was sampled from."""

        def unmasked(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": None}

        place_patches_as_vllm(model.base_model.vision_tower.embeddings)
        model.base_model.vision_tower.encoder.register_forward_pre_hook(unmasked, with_kwargs=True)
