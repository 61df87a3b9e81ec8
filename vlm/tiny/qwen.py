"""Make tiny Qwen models: Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

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


def qwen2_5_vl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Make a Qwen2.5-VL with patches of 14 pixels, merged two by two: a token has 28 x 28 pixels, and the smallest
    image of 56 x 56 has four."""
    tokenizer = _tokenizer(words)
    config = Qwen2_5_VLConfig(
        text_config=text_config(
            tokenizer,
            sizes,
            rope_parameters=rope_parameters(sizes),
            tie_word_embeddings=True,
            initializer_range=sizes.initializer_range,
        ),
        vision_config={
            **patch_merger(sizes),
            "intermediate_size": sizes.vision_intermediate,
            "out_hidden_size": sizes.hidden,
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "window_size": 112,
            "initializer_range": sizes.initializer_range,
        },
        tie_word_embeddings=True,
        initializer_range=sizes.initializer_range,
        **_media_ids(tokenizer),
    )
    # The demo's model: initialised by transformers, at a width that learns.
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    return TinyModel(model, Qwen2_5_VLProcessor(tokenizer=tokenizer, chat_template=TEMPLATE, **media_processors(sizes)))


def qwen2_vl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    tokenizer = _tokenizer(words)
    config = Qwen2VLConfig(
        text_config=text_config(tokenizer, sizes, rope_parameters=rope_parameters(sizes)),
        vision_config={
            **patch_merger(sizes),
            "embed_dim": sizes.vision_hidden,
            "hidden_size": sizes.hidden,
            "mlp_ratio": 2,
        },
        **_media_ids(tokenizer),
    )
    processor = Qwen2VLProcessor(tokenizer=tokenizer, chat_template=TEMPLATE, **media_processors(sizes))
    return TinyModel(widen(Qwen2VLForConditionalGeneration(config)), processor)


def qwen3_vl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Make a Qwen3-VL with patches of 16 pixels. The tower's features also enter the first two language layers
    (deepstack)."""
    tokenizer = _tokenizer(words)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    edge = {"shortest_edge": 4 * 32**2, "longest_edge": sizes.max_image_tokens * 32**2}
    long = {"shortest_edge": 4 * 32**2, "longest_edge": 8 * sizes.max_image_tokens * 32**2}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, size=edge, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=16, size=long, **half),
        chat_template=TEMPLATE,
    )
    config = Qwen3VLConfig(
        text_config=text_config(
            tokenizer,
            sizes,
            head_dim=sizes.hidden // sizes.heads,
            rope_parameters=rope_parameters(sizes) | {"mrope_interleaved": True},
        ),
        vision_config={
            **patch_merger(sizes),
            "intermediate_size": sizes.vision_intermediate,
            "out_hidden_size": sizes.hidden,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(sizes.vision_depth)),
        },
        **_media_ids(tokenizer),
    )
    return TinyModel(widen(Qwen3VLForConditionalGeneration(config)), processor)


def media_processors(sizes: TinySizes) -> dict[str, Any]:
    """Return the processors of images and of videos, for patches of 14 pixels that are merged two by two."""
    pixels = {"shortest_edge": 4 * 28**2, "longest_edge": sizes.max_image_tokens * 28**2}
    images = Qwen2VLImageProcessor(size=pixels)
    videos = Qwen2VLVideoProcessor(size=pixels, image_mean=images.image_mean, image_std=images.image_std)
    return {"image_processor": images, "video_processor": videos}


def patch_merger(sizes: TinySizes) -> dict[str, Any]:
    """Return arguments that the vision towers of all Qwen models share."""
    return {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.vision_hidden,
        "num_heads": sizes.vision_heads,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def rope_parameters(sizes: TinySizes) -> dict[str, Any]:
    """Split the rotary pairs of one head: a quarter for time, and three eighths each for height and width ([4, 6, 6] of
    16)."""
    pairs = sizes.hidden // sizes.heads // 2
    spatial = pairs * 3 // 8
    section = [pairs - 2 * spatial, spatial, spatial]
    return {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": section}


def _tokenizer(words: Sequence[str] | None) -> PreTrainedTokenizerFast:
    return make_tokenizer(words, QWEN_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>", chat_template=TEMPLATE)


def _media_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "image_token_id": token_id(tokenizer, "<|image_pad|>"),
        "video_token_id": token_id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": token_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": token_id(tokenizer, "<|vision_end|>"),
    }
