"""Make tiny vision-language models: random weights, a tokenizer and a processor, without any download.

    build_tiny("qwen2_5_vl", directory)  ──▶  directory in Hugging Face format, as transformers and vLLM load it

Everything but the size is real, so the code that trains a large checkpoint also trains these models, in the demo and in
tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vlm.families.registry import ADAPTERS
from vlm.publish import publish_saved_model
from vlm.tiny import families, llava, omni, qwen, text
from vlm.tiny.base import ANSWER_TAGS, TinyModel, TinySizes


def build_tiny(
    family: str,
    directory: str | Path,
    *,
    seed: int = 0,
    words: Sequence[str] | None = None,
    sizes: TinySizes | None = None,
) -> Path:
    """Save a random float32 model of `family` (a key of `TINY`) into `directory` and return it.

    `words` is the whole vocabulary of a tokenizer with one token per word, with words separated by blanks; the short
    sequences suit the demo. None: one token per byte, for any text. Raises ValueError for an unknown family."""
    if family not in TINY:
        raise ValueError(f"no tiny model of family {family!r}; there are: {', '.join(sorted(TINY))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiny = TINY[family](words, sizes or TinySizes())
    directory = Path(directory)
    tiny.model.save_pretrained(directory)
    tiny.processor.save_pretrained(directory)
    adapter = ADAPTERS.get(family) or ADAPTERS[f"llava/{family}"]
    publish_saved_model(directory, adapter(tiny.processor, tiny.model.config), tiny.model)
    return directory


TINY: dict[str, Callable[[Sequence[str] | None, TinySizes], TinyModel]] = {
    "aria": families.aria,
    "gemma3": families.gemma3,
    "idefics3": families.idefics3,
    "internvl": families.internvl,
    "llama": text.llama,
    "llava": llava.llava,
    "llava_next": llava.llava_next,
    "llava_onevision": llava.llava_onevision,
    "mistral3": llava.mistral3,
    "pixtral": llava.pixtral,
    "qwen2": text.qwen2,
    "qwen2_5_omni": omni.qwen2_5_omni,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen2_vl": qwen.qwen2_vl,
    "qwen3": text.qwen3,
    "qwen3_vl": qwen.qwen3_vl,
    "smolvlm": families.smolvlm,
}
"""Family -> its maker. The name is the model type, except for `pixtral`, a LLaVA with another vision tower."""

__all__ = ["ANSWER_TAGS", "TINY", "TinyModel", "TinySizes", "build_tiny"]
