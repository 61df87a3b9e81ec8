"""Make tiny models of InternVL, Gemma3, Idefics3, SmolVLM and Aria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaImageProcessor,
    AriaProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
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

SQUARE = {"height": 56, "width": 56}


def internvl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Make an InternVL with one to four tiles and a thumbnail, of four tokens each."""
    template = chat_template("<IMG_CONTEXT>\n", "<video>\n")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = chat_tokenizer(words, list(named.values()), template, **named)
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=template,
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer, sizes)},
        vision_config=vision_config(sizes, image_size=[56, 56], patch_size=[14, 14]),
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return TinyModel(widen(InternVLForConditionalGeneration(config)), processor)


def gemma3(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Make a Gemma3 with four tokens per image. Layers alternate between a sliding window and full attention."""
    template = chat_template("<start_of_image>")
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    newlines = ["\n" * n for n in range(1, 5)]  # vLLM looks these up in Gemma's vocabulary
    tokenizer = chat_tokenizer(words, [*named.values(), *newlines], template, **named)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=SQUARE),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=template,
    )
    head_size = sizes.hidden // sizes.heads
    config = Gemma3Config(
        text_config=text_config(
            tokenizer,
            sizes,
            head_dim=head_size,
            query_pre_attn_scalar=head_size,
            sliding_window=1024,
            num_hidden_layers=2,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        vision_config=vision_config(sizes, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, "<image_soft_token>"),
    )
    # Gemma multiplies embeddings by the square root of the width.
    return TinyModel(widen(Gemma3ForConditionalGeneration(config), embedding_std=0.05), processor)


def _idefics_tokenizer(
    words: Sequence[str] | None, template: str, **further: str
) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """Return the tokenizer, and the sizes of the image processor: up to 2 x 2 tiles of 56 pixels and a thumbnail."""
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        **further,
    }
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = chat_tokenizer(words, [*named.values(), *tiles], template, **named)
    return tokenizer, {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}


def idefics3(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    template = chat_template("<image>")
    tokenizer, edges = _idefics_tokenizer(words, template)
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(**edges), tokenizer=tokenizer, image_seq_len=4, chat_template=template
    )
    config = Idefics3Config(
        text_config={"model_type": "llama", **text_config(tokenizer, sizes)},
        vision_config=vision_config(sizes),
        image_token_id=token_id(tokenizer, "<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TinyModel(widen(Idefics3ForConditionalGeneration(config)), processor)


def smolvlm(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    template = chat_template("<image>")  # vLLM takes no video of this family
    tokenizer, edges = _idefics_tokenizer(words, template, video_token="<video>")
    one_tile = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**edges),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**one_tile),
        image_seq_len=4,
        chat_template=template,
    )
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **text_config(tokenizer, sizes)},
        vision_config=vision_config(sizes),
        image_token_id=token_id(tokenizer, "<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TinyModel(widen(SmolVLMForConditionalGeneration(config)), processor)


def aria(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Make an Aria: a mixture of experts with eight tokens per image, which is padded to 490 x 490 pixels, in 14 x 14
    patches."""
    template = chat_template("<|img|>")
    tokenizer = chat_tokenizer(words, ["<|img|>"], template, image_token="<|img|>")
    tokenizer.unk_token = tokenizer.pad_token
    processor = AriaProcessor(
        image_processor=AriaImageProcessor(max_image_size=490, min_image_size=336),
        tokenizer=tokenizer,
        size_conversion={490: 8, 980: 8},
        chat_template=template,
    )
    config = AriaConfig(
        text_config=text_config(
            tokenizer, sizes, model_type="aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
        ),
        vision_config=vision_config(sizes, model_type="idefics3_vision", image_size=980, patch_size=35),
        projector_patch_to_query_dict={14 * 14: 8, 28 * 28: 8},
        image_token_index=token_id(tokenizer, "<|img|>"),
    )
    return TinyModel(widen(AriaForConditionalGeneration(config)), processor)
