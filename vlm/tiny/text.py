"""Make tiny text-only models: Qwen2, Qwen3 and Llama."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vlm.tiny.base import TinyModel, TinySizes, chat_template, chat_tokenizer, text_config, widen

TEMPLATE = chat_template()


def qwen2(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    tokenizer = chat_tokenizer(words, (), TEMPLATE)
    return TinyModel(widen(Qwen2ForCausalLM(Qwen2Config(**text_config(tokenizer, sizes)))), tokenizer)


def qwen3(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    tokenizer = chat_tokenizer(words, (), TEMPLATE)
    config = Qwen3Config(**text_config(tokenizer, sizes, head_dim=sizes.hidden // sizes.heads))
    return TinyModel(widen(Qwen3ForCausalLM(config)), tokenizer)


def llama(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    tokenizer = chat_tokenizer(words, (), TEMPLATE)
    return TinyModel(widen(LlamaForCausalLM(LlamaConfig(**text_config(tokenizer, sizes)))), tokenizer)
