"""The tokens that end a completion besides the tokenizer's own."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig


def end_tokens(path: str, model_config: Any) -> tuple[int, ...]:
    """The `eos_token_id` of the model's generation_config.json, or of its config.json if that is missing. vLLM stops at
    these in any case, and takes nothing else from these files (`rollout.engines.vllm_config.engine_arguments`)."""
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:
        generation = GenerationConfig.from_model_config(model_config)
    ids = generation.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
