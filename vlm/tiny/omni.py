"""Make a tiny Qwen2.5-Omni: the thinker, which takes images, videos and sounds and answers with text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from vlm.tiny.base import TinyModel, TinySizes, chat_template, chat_tokenizer, text_config, token_id, widen
from vlm.tiny.qwen import media_processors, patch_merger, rope_parameters

TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def qwen2_5_omni(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    template = chat_template(
        "<|vision_bos|><|IMAGE|><|vision_eos|>",
        "<|vision_bos|><|VIDEO|><|vision_eos|>",
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
    )
    tokenizer = chat_tokenizer(words, list(TOKENS.values()), template, **TOKENS)
    processor = Qwen2_5OmniProcessor(
        **media_processors(sizes),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=32, sampling_rate=16000, chunk_length=30, return_attention_mask=True, padding_side="right"
        ),
        tokenizer=tokenizer,
        chat_template=template,
    )
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": sizes.vision_intermediate,
            "d_model": sizes.vision_hidden,
            "n_window": 100,
            "output_dim": sizes.hidden,
            "max_source_positions": 1500,
        },
        vision_config={
            **patch_merger(sizes),
            "intermediate_size": sizes.vision_intermediate,
            "out_hidden_size": sizes.hidden,
            "fullatt_block_indexes": [sizes.vision_depth - 1],
            "window_size": 112,
        },
        text_config=text_config(tokenizer, sizes, rope_parameters=rope_parameters(sizes)),
        audio_token_index=token_id(tokenizer, "<|AUDIO|>"),
        image_token_index=token_id(tokenizer, "<|IMAGE|>"),
        video_token_index=token_id(tokenizer, "<|VIDEO|>"),
        audio_start_token_id=token_id(tokenizer, "<|audio_bos|>"),
        audio_end_token_id=token_id(tokenizer, "<|audio_eos|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_bos|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_eos|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return TinyModel(widen(Qwen2_5OmniThinkerForConditionalGeneration(config)), processor)
