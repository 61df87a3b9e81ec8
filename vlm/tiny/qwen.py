"""Tiny Qwen models: Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vlm.tiny.base import TinyModel, TinySizes, chat_template, make_tokenizer, text_config, token_id, widen

TEMPLATE = chat_template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")

QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def mrope_section(head_size: int) -> list[int]:
    """Rotary pairs of one head given to time, height and width: a quarter and three eighths each ([4, 6, 6] of 16)."""
    pairs = head_size // 2
    spatial = pairs * 3 // 8
    return [pairs - 2 * spatial, spatial, spatial]


def qwen2_5_vl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Patches of 14 pixels, merged two by two: 28 x 28 pixels a token, four for the smallest image of 56 x 56."""
    tokenizer = make_tokenizer(words, QWEN_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>", chat_template=TEMPLATE)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL}
    pixels = {"shortest_edge": 4 * 28**2, "longest_edge": sizes.max_image_tokens * 28**2}
    image_processor = Qwen2VLImageProcessor(size=pixels)
    # vLLM normalises video with the image processor's statistics: the two must be equal.
    video_processor = Qwen2VLVideoProcessor(
        size=pixels, image_mean=image_processor.image_mean, image_std=image_processor.image_std
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": sizes.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": mrope_section(sizes.hidden // sizes.heads),
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
            "initializer_range": sizes.initializer_range,
        },
        vision_config={
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden,
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "window_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": sizes.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=sizes.initializer_range,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    processor = Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=TEMPLATE,
    )
    return TinyModel(model, processor)


def qwen2_vl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    tokenizer = make_tokenizer(words, QWEN_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>", chat_template=TEMPLATE)
    pixels = {"shortest_edge": 4 * 28**2, "longest_edge": sizes.max_image_tokens * 28**2}
    image_processor = Qwen2VLImageProcessor(size=pixels)
    processor = Qwen2VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        # vLLM normalises video with the image processor's statistics: the two must be equal.
        video_processor=Qwen2VLVideoProcessor(
            size=pixels, image_mean=image_processor.image_mean, image_std=image_processor.image_std
        ),
        chat_template=TEMPLATE,
    )
    config = Qwen2VLConfig(
        text_config=text_config(tokenizer, sizes, rope_parameters=_rope(sizes)),
        vision_config={
            "depth": sizes.vision_depth,
            "embed_dim": sizes.vision_hidden,
            "hidden_size": sizes.hidden,
            "num_heads": sizes.vision_heads,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **_media_ids(tokenizer),
    )
    return TinyModel(widen(Qwen2VLForConditionalGeneration(config)), processor)


def qwen3_vl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Patches of 16 pixels; the tower's features enter the first two language layers too (deepstack)."""
    tokenizer = make_tokenizer(words, QWEN_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>", chat_template=TEMPLATE)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    edge = {"shortest_edge": 4 * 32**2, "longest_edge": sizes.max_image_tokens * 32**2}
    long = {"shortest_edge": 4 * 32**2, "longest_edge": 8 * sizes.max_image_tokens * 32**2}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, size=edge, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=16, size=long, **half),
        chat_template=TEMPLATE,
    )
    head_size = sizes.hidden // sizes.heads
    config = Qwen3VLConfig(
        text_config=text_config(
            tokenizer, sizes, head_dim=head_size, rope_parameters=_rope(sizes) | {"mrope_interleaved": True}
        ),
        vision_config={
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(sizes.vision_depth)),
        },
        **_media_ids(tokenizer),
    )
    return TinyModel(widen(Qwen3VLForConditionalGeneration(config)), processor)


def _rope(sizes: TinySizes) -> dict[str, Any]:
    section = mrope_section(sizes.hidden // sizes.heads)
    return {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": section}


def _media_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
    }
