"""Common parts of the tiny models: sizes, tokenizers, chat template, text towers, and wide random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Tags are ordinary tokens, so that decoding with `skip_special_tokens` keeps them for the rewards."""

CHAT_ROLES = ("system", "user", "assistant")
"""Words that chat templates write; every word-level vocabulary has them."""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny model. The default is the 0.7M-parameter model of the demo. Every width is even, for tensor
    parallelism."""

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
    """Standard deviation of the weights. At the usual 0.02, so narrow a model passes on hardly any of the image: it
    does not learn to see, and changed pixels hardly change its log-probabilities."""


@dataclass(frozen=True)
class TinyModel:
    """A model with its tokenizer and processor, which `build_tiny` saves."""

    model: PreTrainedModel
    processor: ProcessorMixin


def make_tokenizer(
    words: Sequence[str] | None, special: Sequence[str], *, eos: str, pad: str, chat_template: str, **named: Any
) -> PreTrainedTokenizerFast:
    """Make a tokenizer over `words`, or over bytes if there are none, with `special` tokens and the answer tags."""
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


END = "<|im_end|>"
"""The token that ends a turn in every tiny model."""
PAD = "<|endoftext|>"
CHAT_SPECIAL = (PAD, "<|im_start|>", END)


def chat_template(image: str = "", video: str = "", audio: str = "") -> str:
    """Return a ChatML template. An image, a video or a sound in a message is written as the text given for it."""
    media = "".join(
        f"{{% elif part['type'] == '{kind}' %}}{text}" for kind, text in (("video", video), ("audio", audio)) if text
    )
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + media + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def chat_tokenizer(
    words: Sequence[str] | None, special: Sequence[str], template: str, **named: Any
) -> PreTrainedTokenizerFast:
    """Make a tokenizer for ChatML with further `special` tokens. `named` gives the processor's names of some of
    them."""
    extra = {"extra_special_tokens": named} if named else {}
    return make_tokenizer(words, (*CHAT_SPECIAL, *special), eos=END, pad=PAD, chat_template=template, **extra)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of a token. Raises KeyError if it does not exist."""
    return tokenizer.get_vocab()[token]


def text_config(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes, **changes: Any) -> dict[str, Any]:
    """Return arguments that the text towers of all families share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.max_positions,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **changes,
    }


def vision_config(sizes: TinySizes, **changes: Any) -> dict[str, Any]:
    """Return arguments that the ordinary vision towers share: images of 56 x 56 pixels with 4 x 4 patches."""
    return {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_hidden_layers": sizes.vision_depth,
        "num_attention_heads": sizes.vision_heads,
        "image_size": 56,
        "patch_size": 14,
        **changes,
    }


def widen(model: PreTrainedModel, embedding_std: float = 0.5) -> PreTrainedModel:
    """Return `model` in float32 with weights so wide that pixels change its log-probabilities. Matrices keep the
    variance of their input, embeddings get `embedding_std`, and biases get 0.1."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    model = model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                wide = id(parameter) in embeddings or "embed" in name
                parameter.normal_(0.0, embedding_std if wide else 1.0 / math.sqrt(parameter[0].numel()))
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model
