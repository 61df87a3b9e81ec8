"""Tiny vision-language models made on the spot: random weights, a tokenizer, a processor, nothing downloaded.

    build_tiny("qwen2_5_vl", directory)  ──▶  directory in Hugging Face format, as transformers and vLLM load it

Everything is real but the size, so the same code that trains a large checkpoint trains these, in the demo and in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Ordinary tokens, not special ones: decoding with `skip_special_tokens` keeps them for the rewards to read."""

CHAT_ROLES = ("system", "user", "assistant")
"""Words that chat templates write; every word-level vocabulary has them."""


@dataclass(frozen=True)
class TinySizes:
    """The default is the 0.7M-parameter model of the demo; every width divides by two for tensor parallelism."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    max_positions: int = 4096
    vision_hidden: int = 64
    vision_intermediate: int = 128
    vision_depth: int = 2
    vision_heads: int = 2
    max_image_tokens: int = 64
    """Larger images are scaled down to this many tokens."""
    initializer_range: float = 0.1
    """Standard deviation of the weights. At the usual 0.02 so narrow a model passes hardly any of the image on: it
    neither learns to see nor shows in its log-probabilities that the pixels changed."""


@dataclass(frozen=True)
class TinyModel:
    """What a family makes; `build_tiny` saves it."""

    model: PreTrainedModel
    processor: ProcessorMixin


def build_tiny(
    family: str,
    directory: str | Path,
    *,
    seed: int = 0,
    words: Sequence[str] | None = None,
    sizes: TinySizes | None = None,
) -> Path:
    """Save a random float32 model of `family` (a key of `TINY`) into `directory` and return it.

    `words`: the whole vocabulary of a tokenizer with one token per word, words separated by blanks (few, short
    sequences: what the demo learns on). None: one token per byte, for any text.
    Raises ValueError for an unknown family."""
    if family not in TINY:
        raise ValueError(f"no tiny model of family {family!r}; there are: {', '.join(sorted(TINY))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiny = TINY[family](words, sizes or TinySizes())
    directory = Path(directory)
    tiny.model.save_pretrained(directory)
    tiny.processor.save_pretrained(directory)
    return directory


def make_tokenizer(
    words: Sequence[str] | None, special: Sequence[str], *, eos: str, pad: str, chat_template: str, **named: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer over `words`, or over bytes if there are none, with `special` tokens and the answer tags."""
    if words is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", *CHAT_ROLES, *words]))}
        tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(ANSWER_TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **named,
    )


CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

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


def _qwen2_5_vl(words: Sequence[str] | None, sizes: TinySizes) -> TinyModel:
    """Patches of 14 pixels, merged two by two: 28 x 28 pixels a token, four for the smallest image of 56 x 56."""
    tokenizer = make_tokenizer(
        words, QWEN_SPECIAL, eos="<|im_end|>", pad="<|endoftext|>", chat_template=CHATML_TEMPLATE
    )
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
        chat_template=CHATML_TEMPLATE,
    )
    return TinyModel(model, processor)


TINY: dict[str, Callable[[Sequence[str] | None, TinySizes], TinyModel]] = {
    "qwen2_5_vl": _qwen2_5_vl,
}
"""family (the model type) -> its maker: a further family is one function and one entry."""
