"""Make tiny models of the LLaVA kind: a vision tower, a projector and a language model. These are LLaVA-1.5, LLaVA-NeXT
and LLaVA-OneVision, and Pixtral (as transformers has it) and Mistral3, whose tower takes images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)

from vlm.tiny.base import (
    TinyModel,
    TinySizes,
    chat_template,
    chat_tokenizer,
    text_config,
    token_id,
    vision_config,
    widen,
)

TILINGS = [[56, 56], [56, 112], [112, 56], [112, 112]]
"""Heights and widths to which an image may be scaled before it is cut into tiles of 56 x 56 pixels."""


def _clip_tower(sizes: TinySizes) -> dict[str, Any]:
    return vision_config(
        sizes,
        model_type="clip_vision_model",
        num_hidden_layers=sizes.vision_depth + 1,  # the last layer is not used
        projection_dim=sizes.vision_hidden,
    )


def llava(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Make a LLaVA-1.5 with 16 tokens per image of any size."""
    template = chat_template("<image>\n")
    tokenizer = chat_tokenizer(words, ["<image>"], template, image_token="<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", **text_config(tokenizer, sizes)},
        vision_config=_clip_tower(sizes),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return TinyModel(widen(LlavaForConditionalGeneration(config)), processor)


def llava_next(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Make a LLaVA-NeXT: an image is a thumbnail and up to four tiles, unpadded to its shape, with a newline token
    after each row."""
    template = chat_template("<image>\n")
    tokenizer = chat_tokenizer(words, ["<image>"], template, image_token="<image>")
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=TILINGS
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaNextConfig(
        text_config={"model_type": "llama", **text_config(tokenizer, sizes)},
        vision_config=_clip_tower(sizes),
        image_token_index=token_id(tokenizer, "<image>"),
        image_grid_pinpoints=TILINGS,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return TinyModel(widen(LlavaNextForConditionalGeneration(config)), processor)


def llava_onevision(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    template = chat_template("<image>\n", "<video>\n")
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = chat_tokenizer(words, list(named.values()), template, **named)
    square = {"height": 56, "width": 56}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=TILINGS),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer, sizes)},
        vision_config=vision_config(sizes, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        image_grid_pinpoints=TILINGS,
    )
    return TinyModel(widen(LlavaOnevisionForConditionalGeneration(config)), processor)


def _pixtral_parts(
    words: Sequence[str] | None, sizes: TinySizes, merge: int
) -> tuple[PreTrainedTokenizerFast, PixtralProcessor, dict[str, Any], dict[str, Any]]:
    """Return the common parts of Pixtral and Mistral3. Images keep their shape, up to 112 pixels per side. A row of
    patches ends in [IMG_BREAK], and the last row in [IMG_END]."""
    template = chat_template("[IMG]")
    tokenizer = chat_tokenizer(words, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"], template)
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}),
        tokenizer=tokenizer,
        patch_size=14,
        spatial_merge_size=merge,
        chat_template=template,
    )
    tower = vision_config(sizes, model_type="pixtral", image_size=112, head_dim=sizes.vision_hidden // 2)
    head_size = sizes.hidden // sizes.heads
    text = {"model_type": "mistral", **text_config(tokenizer, sizes, head_dim=head_size, sliding_window=None)}
    return tokenizer, processor, tower, text


def pixtral(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    tokenizer, processor, tower, text = _pixtral_parts(words, sizes, merge=1)
    config = LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=token_id(tokenizer, "[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
    )
    return TinyModel(widen(LlavaForConditionalGeneration(config)), processor)


def mistral3(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    tokenizer, processor, tower, text = _pixtral_parts(words, sizes, merge=2)
    config = Mistral3Config(
        text_config=text,
        vision_config=tower,
        image_token_index=token_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return TinyModel(widen(Mistral3ForConditionalGeneration(config)), processor)
