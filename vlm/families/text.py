"""Text-only language models (Qwen2, Qwen3, Llama) take the same path without media."""

from __future__ import annotations

from typing import ClassVar

from vlm.adapter import MultimodalAdapter


class TextAdapter(MultimodalAdapter):
    """Positions count tokens, and the attention mask is causal."""

    shares_prompts: ClassVar[bool] = True
